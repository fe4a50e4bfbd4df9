"""The comparison of a generation's first inputs, made while the denoiser already works on them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stretto.diffusion.deferred import Aside, Deferred
from stretto.diffusion.exchange import Header, _largest, gather, opening
from stretto.errors import NonFinite, RanksDisagree
from stretto.mesh.local import LocalWorld


def test_inputs_are_compared_as_they_were_when_the_call_began():
    def body(mesh):
        latents = torch.ones(2, 3)
        check = opening(mesh, (latents,), {"timestep": torch.tensor(999)})
        latents.fill_(mesh.world_rank)  # the denoiser may work in place
        check()
        return latents

    LocalWorld({"step": 2}, timeout_s=20).run(body)


def test_unlike_inputs_are_named_by_rank():
    def body(mesh):
        with pytest.raises(RanksDisagree, match=f"rank {1 - mesh.world_rank} has inputs"):
            opening(mesh, torch.full((4,), float(mesh.world_rank)))()

    LocalWorld({"step": 2}, timeout_s=20).run(body)


def test_one_rank_has_nobody_to_disagree_with():
    opening(LocalWorld({"step": 1}).mesh(0), torch.ones(1))()


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_magnitude_has_the_size_that_the_header_keeps_for_it(dtype):
    """Also under autocast on a GPU; tensors without memory stand in for a GPU's."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            assert _largest(torch.empty(2, 3, dtype=dtype, device="cuda")).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("size", [2, 3], ids=["short window", "full window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predictions_of_any_layout_arrive_as_they_were(dtype, size):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 2, 6, 4, 5, generator=generator).to(dtype)
    whole[2] *= torch.finfo(dtype).max / 8
    layouts = (
        lambda t: t[:, ::2],
        lambda t: t[:, :3].contiguous(memory_format=torch.channels_last),
        lambda t: t[:, :3].transpose(2, 3).contiguous().transpose(2, 3),
    )
    guided = [layouts[rank](whole[rank]) for rank in range(3)]

    def body(mesh):
        rank = mesh.world_rank
        header = Header(rank, 1, size, str(dtype), "cpu", tuple(guided[0].shape), bytes(16))
        own = guided[rank] if rank < size else None
        found = gather(mesh, own, guided[rank], header, Deferred(Aside()))
        laid_out = torch.empty_like(guided[rank]).stride()
        assert all(tensor.stride() == laid_out for tensor in found)
        return [torch.equal(*pair) for pair in zip(found, guided[:size], strict=True)]

    assert LocalWorld({"step": 3}, timeout_s=20).run(body) == [[True] * size] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ranks_name_the_prediction_with_a_hole(dtype, value):
    def body(mesh):
        rank = mesh.world_rank
        own = torch.ones(2, 700, dtype=dtype)
        if rank == 1:
            own[1, 613] = value
        header = Header(rank, 4, 3, str(dtype), "cpu", (2, 700), bytes(16))
        with pytest.raises(NonFinite, match="step rank 1: the prediction of step 5"):
            gather(mesh, own, own, header, Deferred(Aside()))

    LocalWorld({"step": 3}, timeout_s=20).run(body)
