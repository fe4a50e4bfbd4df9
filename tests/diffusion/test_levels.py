"""Levels that lie on the device already give the bits of levels that are sent there."""

from __future__ import annotations

import copy

import pytest
import torch

from stretto.diffusion.api import parallelized
from stretto.diffusion.levels import Level, Levels, Twins
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.testing import models

CPU, META = torch.device("cpu"), torch.device("meta")


def test_an_item_is_a_tensor_of_the_host_until_it_is_sent():
    grid = torch.linspace(1, 0, 5)
    levels = Levels.of(grid, CPU)
    assert isinstance(levels[1], Level)
    assert type(levels[1] * 2) is torch.Tensor
    assert float(levels[-1] + levels[0]) == 1.0
    assert type(levels[1].to(CPU)) is torch.Tensor
    assert levels[1].to(torch.float64).dtype == torch.float64
    assert torch.equal(levels[1:3], grid[1:3])
    assert len(levels) == 5


def test_what_a_scheduler_kept_can_be_copied():
    levels = Levels.of(torch.ones(3), CPU)
    for kept in copy.deepcopy({"grid": levels, "level": levels[1]}).values():
        assert type(kept) is torch.Tensor
        kept.zero_()
    assert float(levels.sum()) == 3.0


def test_what_is_sent_may_be_written_into():
    levels = Levels.of(torch.ones(3), CPU)
    levels[0].to(CPU).zero_()
    assert float(levels[0].to(CPU)) == 1.0


def test_a_new_grid_gets_new_twins():
    twins, grid = Twins(), torch.ones(3)
    first = twins.of(grid, META)
    assert twins.of(grid, META) is first
    grid.mul_(2)
    assert float(twins.of(grid, META)[0]) == 2.0
    assert twins.of(grid, CPU) is None
    assert twins.of(None, META) is None
    assert twins.of(grid.to(META), META) is None


@pytest.mark.parametrize(
    "name", ["sd15-unipc", "sd15-dpm++2m", "sd15-euler", "sd15-ddim", "sd3-flow"]
)
def test_steps_have_the_bits_they_had(name, monkeypatch):
    case = models.CASES[name]
    pipe = case.pipeline()
    expected = case.call(pipe)
    state = copy.deepcopy(vars(pipe.scheduler))
    made = []

    def of(self, grid, device):
        if not isinstance(grid, torch.Tensor):
            return None
        made.append(Levels.of(grid, device))
        return made[-1]

    monkeypatch.setattr(Twins, "of", of)
    with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0)):
        assert torch.equal(case.call(pipe), expected)
    assert bool(made) == ("sigmas" in state)
    assert not isinstance(vars(pipe.scheduler).get("sigmas"), Levels)
