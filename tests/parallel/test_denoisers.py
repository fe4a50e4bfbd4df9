"""Transformers of diffusers, whole inputs and outputs, cut and gathered as their plans say."""

import pytest
import torch

from stretto.errors import UnsupportedModel
from stretto.mesh.local import LocalWorld
from stretto.parallel.api import parallelize
from stretto.plan.context import Context

diffusers = pytest.importorskip("diffusers")


def noise(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def grid(rows, columns, dims, batch=None):
    """Image positions with `dims` coordinates, the second is the row, the third the column."""
    ids = torch.zeros(rows * columns, dims, dtype=torch.float64)
    ids[:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[:, 2] = torch.arange(columns).repeat(rows)
    return ids if batch is None else ids.expand(batch, -1, -1)


def flux():
    kind = diffusers.FluxTransformer2DModel
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "in_channels": 4}
    inputs = {"hidden_states": noise(2, 15, 4), "encoder_hidden_states": noise(2, 7, 32)}
    inputs |= {"pooled_projections": noise(2, 32), "timestep": torch.tensor([0.3, 0.7]).double()}
    inputs |= {"img_ids": grid(3, 5, 3), "txt_ids": torch.zeros(7, 3).double()}
    return kind(patch_size=1, num_layers=1, num_single_layers=2, **sizes), inputs


def flux2():
    kind = diffusers.Flux2Transformer2DModel
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4, 4)}
    sizes |= {"joint_attention_dim": 32, "in_channels": 4}
    inputs = {"hidden_states": noise(2, 15, 4), "encoder_hidden_states": noise(2, 7, 32)}
    inputs |= {"timestep": torch.tensor([0.3, 0.7]).double(), "guidance": noise(2).abs()}
    inputs |= {"img_ids": grid(3, 5, 4, 2), "txt_ids": torch.zeros(2, 7, 4).double()}
    return kind(patch_size=1, num_layers=1, num_single_layers=1, **sizes), inputs


def wan(kind="WanTransformer3DModel", **more):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4}
    sizes |= {"out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2}
    inputs = {"hidden_states": noise(1, 4, 3, 6, 10), "timestep": torch.tensor([5])}
    inputs |= {"encoder_hidden_states": noise(1, 7, 16)}
    return getattr(diffusers, kind)(rope_max_seq_len=32, **sizes, **more), inputs


def wan_with_image():
    built, inputs = wan(image_dim=16, added_kv_proj_dim=24)
    return built, inputs | {"encoder_hidden_states_image": noise(1, 5, 16)}


def qwen():
    kind = diffusers.QwenImageTransformer2DModel
    sizes = {"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (8, 4, 4)}
    sizes |= {"joint_attention_dim": 16, "in_channels": 16, "out_channels": 4}
    inputs = {"hidden_states": noise(1, 15, 16), "encoder_hidden_states": noise(1, 7, 16)}
    inputs |= {"encoder_hidden_states_mask": None, "timestep": torch.tensor([0.3]).double()}
    return kind(patch_size=2, num_layers=2, **sizes), inputs | {"img_shapes": [(1, 3, 5)]}


def ltx():
    kind = diffusers.LTXVideoTransformer3DModel
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32}
    sizes |= {"in_channels": 8, "out_channels": 8, "caption_channels": 32, "num_layers": 1}
    inputs = {"hidden_states": noise(1, 30, 8), "encoder_hidden_states": noise(1, 8, 32)}
    inputs |= {"timestep": torch.tensor([500]), "encoder_attention_mask": None}
    return kind(patch_size=1, **sizes), inputs | {"num_frames": 2, "height": 3, "width": 5}


def chronoedit():
    return wan("ChronoEditTransformer3DModel")


def result(model, inputs):
    out = model(**inputs, return_dict=False)
    while not isinstance(out, torch.Tensor):
        out = out[0]
    return out


def build(make):
    torch.manual_seed(0)
    model, inputs = make()
    return model.double(), inputs


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", [Context(ring=2), Context(ulysses=2)], ids=Context.short)
@pytest.mark.parametrize("make", [flux, flux2, wan, wan_with_image, chronoedit, qwen, ltx])
def test_equals_one_rank(make, plan):
    if make is qwen and plan.ulysses > 1:
        plan = Context(ulysses=3)
    model, inputs = build(make)
    right = result(model, inputs)
    weights = noise(*right.shape)
    (right * weights).sum().backward()

    def body(mesh):
        bound, _ = build(make)
        with parallelize(bound, plan, mesh=mesh) as handle:
            assert handle.bound
            out = result(bound, inputs)
            (out * weights).sum().backward()
        for part in bound.modules():
            assert not part._forward_pre_hooks
            assert not part._forward_hooks
            assert "forward" not in part.__dict__
        torch.testing.assert_close(out, right, rtol=1e-6, atol=1e-6 * right.abs().max().item())
        return gradients(bound)

    parts = LocalWorld(plan.sizes).run(body)
    wanted = gradients(model)
    largest = max(grad.abs().max().item() for grad in wanted.values())
    for name, grad in wanted.items():
        found = sum(part.get(name, torch.zeros_like(grad)) for part in parts)
        scale = max(grad.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(found, grad, rtol=0, atol=2e-6 * scale, msg=name)


def test_masked_text_is_refused():
    model, inputs = build(ltx)
    inputs["encoder_attention_mask"] = torch.ones(1, 8, dtype=torch.float64)
    with (
        parallelize(model, Context(), mesh=LocalWorld({}).mesh(0)),
        pytest.raises(UnsupportedModel, match="attn_mask of shape"),
    ):
        result(model, inputs)


def test_a_model_without_a_plan_is_refused():
    model = diffusers.PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16
    )
    with pytest.raises(UnsupportedModel, match="has no _cp_plan"):
        parallelize(model, Context(), mesh=LocalWorld({}).mesh(0))


def test_a_plan_that_was_never_compared_is_refused():
    class Unknown(diffusers.FluxTransformer2DModel):
        pass

    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    model = Unknown(num_layers=1, num_single_layers=1, joint_attention_dim=32, **sizes)
    with pytest.raises(UnsupportedModel, match="Unknown: its _cp_plan was never compared"):
        parallelize(model, Context(), mesh=LocalWorld({}).mesh(0))
