"""Between two scheduler steps: schedulers that return or keep unusual things."""

import inspect

import pytest
import torch

from stretto.diffusion.api import emulate
from stretto.errors import LatentsEdited
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Steps
from stretto.testing import models
from stretto.testing.exactness import Oracle, emulated, on_ranks, reference
from stretto.testing.ranks import run_ranks
from stretto.testing.tiny import unet

WINDOWS = Listed(sizes=(1, 1, 3, 2, 1))


def exact(case, walk):
    """Whether windows with perfect guesses give the bits of the plain pipeline on every rank."""
    known = reference(case)
    assert known.degree_one
    known.pipe.set_progress_bar_config(disable=True)
    plan = Plan(step=Steps(degree=3, windows=WINDOWS, walk=walk, exact_split=False))
    with emulate(known.pipe, plan, predictors=[Oracle(known.guided) for _ in range(3)]) as run:
        case.call(known.pipe)
    return [torch.equal(case.tensor(result), known.output) for result in run.results]


def case_of(scheduler, **facts):
    return models._sd15(scheduler, scheduler, facts=facts)


@pytest.mark.parametrize("walk", ["replay", "leader"])
def test_a_sample_returned_twice_is_no_extra(walk):
    """TCD without noise (eta 0, the default of pipelines) returns its sample under two names."""
    assert all(exact(case_of("TCDScheduler"), walk))


def test_a_leader_sends_no_functions_of_its_scheduler():
    """SA-Solver keeps one made in its constructor, which no pickle takes."""
    assert all(exact(case_of("SASolverScheduler", stochastic=True), "leader"))


@pytest.mark.ranks
def test_a_leader_is_sent_part_of_a_prediction():
    """DiT predicts variances in further channels: what is left without them has gaps in memory."""
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=(1, 2, 2, 2, 1)), walk="leader"))
    expected, _ = emulated(models.OTHERS["dit"], plan)
    for rank in run_ranks(on_ranks, plan.sizes, ["dit"], plan):
        assert rank["dit"]["walk"] == "leader"
        assert torch.equal(rank["dit"]["output"], expected)


def test_a_pipeline_keeps_its_signature_inside():
    pipe = unet.sd15("EulerDiscreteScheduler")
    before = inspect.signature(type(pipe).__call__)
    with emulate(pipe, Plan(step=2)):
        assert inspect.signature(type(pipe).__call__) == before
        assert "generator" in inspect.signature(pipe.__call__).parameters


def in_place(first, scale=0.5):
    """A callback that writes into the latents themselves, from step `first` on."""

    def callback(pipe, i, t, values):
        if i >= first:
            values["latents"].mul_(scale)
        return values

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_latents_written_into_from_the_start_are_walked_by_a_leader(mode):
    """The tensor that the step returned comes back, with other values in it."""
    case = case_of("DDIMScheduler")
    pipe = case.pipeline()
    alone = Steps(degree=2, windows=Listed(sizes=(1,) * 8), exact_split=False)
    with mode():
        plain = case.call(pipe, **in_place(0))
        with emulate(pipe, Plan(step=alone)) as run:
            inside = case.call(pipe, **in_place(0))
    assert run.report.walk == "leader"
    assert torch.equal(inside, plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_latents_written_into_later_are_refused(mode):
    case = case_of("DDIMScheduler")
    pipe = case.pipeline()
    with mode(), emulate(pipe, Plan(step=2)), pytest.raises(LatentsEdited, match="leader"):
        case.call(pipe, **in_place(3))
