"""Batched windows: the same picture from one forward pass per window."""

import pytest
import torch

from stretto.diffusion.api import emulate
from stretto.diffusion.batched import joined
from stretto.diffusion.denoise import Denoise
from stretto.errors import PlanMismatch, UnsupportedPipeline
from stretto.plan.model import Plan
from stretto.plan.options import Steps
from stretto.testing import models
from stretto.testing.exactness import counted

PLAN = Plan(step=Steps(degree=3, exact_split=False))
CASES = ("sd15-ddim", "sdxl-euler", "sd3-flow", "flux-distilled", "wan-unipc", "cogvideox-ddim")


@pytest.mark.parametrize("name", CASES)
def test_batched_windows_equal_separate_calls(name):
    case = models.CASES[name]
    pipe = case.pipeline()
    with emulate(pipe, PLAN):
        separate = case.call(pipe)
    with emulate(pipe, PLAN, batched=True) as run, counted(pipe) as seen:
        together = case.call(pipe)
    assert (together - separate).norm() <= 1e-5 * separate.norm()
    forwards = sum(seen.values())
    # Each rank walks exact steps itself; a window is one forward whatever its size.
    exact = sum(size == 1 for size in run.report.sizes) * PLAN.step.degree
    joint = sum(size > 1 for size in run.report.sizes)
    structure = sum(r.structure_calls for r in run.reports)
    assert forwards == (exact + joint) * case.calls_per_step + structure


def test_guidance_ranks_are_refused():
    pipe = models.CASES["sd15-ddim"].pipeline()
    context = emulate(pipe, Plan(step=2, cfg=2), batched=True)
    with pytest.raises(PlanMismatch, match="cfg=2"):
        context.__enter__()


def call(value, timestep=1.0):
    rows = torch.full((2, 3, 4), float(value))
    return Denoise("unet", lambda *a: a, (rows, torch.tensor(timestep)), {"table": torch.ones(5)})


def test_join():
    whole = joined([call(1, 0.5), call(2, 0.25)])
    assert whole.args[0][:, 0, 0].tolist() == [1, 1, 2, 2]
    assert whole.args[1].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert whole.kwargs["table"].shape == (5,)


def test_tables_that_differ_are_refused():
    other = call(2)
    other.kwargs = {"table": torch.zeros(5)}
    with pytest.raises(UnsupportedPipeline, match=r"table of shape \(5,\) differs"):
        joined([call(1), other])
