"""The comparison of a generation's first inputs, made while the denoiser already works on them."""

from __future__ import annotations

import pytest
import torch

from stretto.diffusion.exchange import opening
from stretto.errors import RanksDisagree
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
