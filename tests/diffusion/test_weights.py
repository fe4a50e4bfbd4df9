"""Ranks that hold unlike weights are noticed before a step is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stretto.diffusion.api import parallelized
from stretto.diffusion.weights import check_weights, hash_of
from stretto.errors import LaunchError, RanksDisagree
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.testing.ranks import run_ranks
from tests.diffusion.test_steps import DDIM


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(9, 9, bias=False), nn.PReLU())


def ranks(change, count=3):
    """Check what `change(rank, module)` makes of a network on every rank."""

    def body(mesh):
        changed = change(mesh.world_rank, network())
        check_weights(mesh, {"unet": changed})

    LocalWorld({"step": count}, timeout_s=20).run(body)


def on_the_last(change):
    return lambda rank, module: change(module) if rank == 2 else module


def scaled(module):
    with torch.no_grad():
        module[1].weight.mul_(1.001)
    return module


def adapted(module):
    module[1].adapter = nn.Linear(2, 2)
    return module


@pytest.mark.parametrize(
    "change",
    [lambda _: network(1), scaled, adapted, lambda module: module.to(torch.bfloat16)],
    ids=["seed", "one parameter", "adapter", "dtype"],
)
def test_unlike_weights_are_named_by_rank(change):
    with pytest.raises(RanksDisagree, match=r"of unet .*: rank 0 has \w{32}, rank 2 \w{32}"):
        ranks(on_the_last(change))


def with_meta(module):
    module[0].weight = nn.Parameter(torch.empty(7, 5, 3, 3, device="meta"))
    return module


def as_inference(module):
    with torch.inference_mode():
        return network()


@pytest.mark.parametrize(
    "change",
    [lambda module: module.to(memory_format=torch.channels_last), with_meta, as_inference],
    ids=["layout", "offloaded", "inference tensors"],
)
def test_equal_weights_in_another_form_pass(change):
    ranks(on_the_last(change))


def test_two_that_can_be_read_are_compared_beside_one_that_cannot():
    def change(rank, module):
        return with_meta(module) if rank == 0 else network(rank)

    with pytest.raises(RanksDisagree, match=r"rank 1 has \w{32}, rank 2 \w{32}"):
        ranks(change)


def test_a_denoiser_that_one_rank_lacks():
    def body(mesh):
        extra = {"controlnet": network()} if mesh.world_rank else {}
        check_weights(mesh, {"unet": network(), **extra})

    with pytest.raises(RanksDisagree, match="denoisers: rank 0 has unet, rank 1 unet, controlnet"):
        LocalWorld({"step": 2}, timeout_s=20).run(body)


def test_of_a_large_model_some_parameters_are_read_and_all_are_named():
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(300))
    one = hash_of(layers)
    with torch.no_grad():
        layers[297].weight.add_(1)
    other = hash_of(layers)
    layers[298].more = nn.Parameter(torch.zeros(1))
    assert len({one, other, hash_of(layers), hash_of(nn.Module())}) == 4


def test_group_offloaded_weights_are_not_compared():
    """Offloaded to a disk they leave memory without values behind."""
    from diffusers.hooks import HookRegistry, ModelHook

    def change(module):
        HookRegistry.check_if_exists_or_initialize(module[0]).register_hook(
            ModelHook(), "group_offloading"
        )
        return scaled(module)

    ranks(on_the_last(change))


def generating(mesh):
    pipe = DDIM.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.unet.conv_in.weight += mesh.world_rank
    with parallelized(pipe, Plan(step=2), mesh=mesh):
        DDIM.call(pipe)


@pytest.mark.ranks
def test_ranks_with_unlike_weights_stop_before_the_first_step():
    with pytest.raises(LaunchError, match=r"RanksDisagree: weights of unet .*: rank 0 has"):
        run_ranks(generating, {"step": 2}, timeout_s=150)
