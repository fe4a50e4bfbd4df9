"""Full-size configurations have the published sizes; their tiny twins decode as pipelines do."""

import full_size
import pytest
import torch

NAMES = sorted(full_size.MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_number(name):
    model = full_size.MODELS[name]()
    with torch.device("meta"):
        denoiser = model.parts(model.default)[model.denoiser]()
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(
        model.parameters, abs=0.05e6
    )


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    """A tiny twin, its pipeline and inputs, and latents of a short run."""
    model = full_size.MODELS[request.param](tiny=True)
    pipe = model.build(model.default, "cpu", torch.float32)
    inputs = model.inputs(model.default, "cpu", torch.float32)
    return model, pipe, inputs, model.call(pipe, inputs, 2)


@torch.no_grad()
def decoded(model, pipe, latents, shared):
    pieces = model.pieces(pipe, latents, shared=shared)
    parts = [model.decode(pipe, piece) for piece in pieces]
    shapes = [model.decoded_shape(pipe, piece) for piece in pieces]
    assert shapes == [tuple(part.shape) for part in parts]
    return model.join(pipe, model.default, parts, shared=shared), len(pieces)


def test_decoding_apart_is_what_the_pipeline_does(made):
    model, pipe, inputs, latents = made
    whole, _ = decoded(model, pipe, latents, shared=False)
    assert torch.equal(whole, model.call(pipe, inputs, 2, "pt"))


def test_shared_decoding_has_several_pieces_and_the_result_of_one_device(made):
    model, pipe, inputs, latents = made
    shared, pieces = decoded(model, pipe, latents, shared=True)
    # A picture is decoded by one rank.
    assert (pieces == 1) == (model.name == "flux")
    if model.name == "cogvideox":
        pipe.vae.enable_tiling()
        try:
            expected = model.call(pipe, inputs, 2, "pt")
        finally:
            pipe.vae.disable_tiling()
        assert torch.equal(shared, expected)
    else:
        expected, _ = decoded(model, pipe, latents, shared=False)
        torch.testing.assert_close(shared, expected, rtol=0, atol=1e-6)


def test_one_seed_gives_one_set_of_weights_and_none_is_zero(made):
    model, pipe, _, _ = made
    other = model.build(model.default, "cpu", torch.float32)
    own, twin = (getattr(p, model.denoiser).state_dict() for p in (pipe, other))
    assert all(torch.equal(own[key], twin[key]) for key in own)
    assert all(v.any() for key, v in own.items() if v.ndim > 1 and key.endswith("weight"))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_weights_give_finite_latents(name):
    model = full_size.MODELS[name](tiny=True)
    pipe = model.build(model.default, "cpu", model.dtype)
    latents = model.call(pipe, model.inputs(model.default, "cpu", model.dtype), 2)
    assert latents.dtype == model.dtype
    assert latents.isfinite().all()
