"""`emulate` and `parallelized` themselves: what they refuse, hand out and leave behind."""

import copy
from types import SimpleNamespace

import pytest
import torch

from stretto.diffusion.adapters import denoisers_of
from stretto.diffusion.api import emulate, parallelized
from stretto.diffusion.local_errors import record
from stretto.errors import SplitMismatch, UnsupportedPipeline
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Guidance
from stretto.testing import models
from tests.diffusion.test_against_naive import Euler, Pipeline

DDIM = models.CASES["sd15-ddim"]


def test_an_emulated_pipeline_is_not_emulated_again():
    """The outer plan would be followed, and the inner one's report would stay empty."""
    pipe = DDIM.pipeline()
    with emulate(pipe, Plan(step=2)):
        inner = emulate(pipe, Plan(cfg=2))
        with pytest.raises(UnsupportedPipeline, match="is inside emulate"):
            inner.__enter__()
        # What the message proposes.
        second = copy.copy(pipe)
        with emulate(second, Plan(cfg=2)) as run:
            DDIM.call(second)
        assert run.report.plan == Plan(cfg=2)


def test_an_emulation_hands_out_all_ranks_and_leaves_nothing_behind():
    pipe = DDIM.pipeline()
    plain = DDIM.call(pipe)
    before = type(pipe), set(vars(pipe)), set(vars(pipe.unet)), set(vars(pipe.scheduler))
    with emulate(pipe, Plan(step=2)) as run:
        assert run.report is None
        output = DDIM.call(pipe)
        assert run.report is run.reports[0]
        assert len(run.reports) == len(run.results) == 2
        assert all(torch.equal(DDIM.tensor(result), output) for result in run.results)
    assert (type(pipe), set(vars(pipe)), set(vars(pipe.unet)), set(vars(pipe.scheduler))) == before
    assert torch.equal(DDIM.call(pipe), plain)


def test_a_failing_call_leaves_the_emulation_of_use():
    pipe = DDIM.pipeline()
    plain = type(pipe)
    with emulate(pipe, Plan(step=2), timeout_s=20) as run:
        with pytest.raises(TypeError):
            DDIM.call(pipe, guidance_scale="much")
        DDIM.call(pipe)
        assert run.report.num_steps == DDIM.steps
    assert type(pipe) is plain


def test_a_method_that_was_wrapped_before_comes_back():
    """Offloading and adapters put a forward of theirs on the instance, too."""
    pipe, calls = DDIM.pipeline(), []
    plain = pipe.unet.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    pipe.unet.forward = theirs
    with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0)):
        assert pipe.unet.forward is not theirs
        DDIM.call(pipe)
    assert pipe.unet.forward is theirs
    assert len(calls) == DDIM.steps


def test_a_family_that_windows_would_disturb_is_refused_with_the_reason():
    """Known by the name of its class; guidance over ranks is left to it."""
    pipe = DDIM.pipeline()
    pipe.__class__ = type("AceStepPipeline", (type(pipe),), {})
    with emulate(pipe, Plan(step=2)), pytest.raises(UnsupportedPipeline, match="momentum"):
        DDIM.call(pipe)
    with emulate(pipe, Plan(cfg=2)) as run:
        DDIM.call(pipe)
    assert run.report.num_steps == DDIM.steps


def test_a_batch_that_was_asked_to_be_cut_and_cannot_be():
    """Guidance by two calls of one row each: `auto` would share out the calls."""
    case = models.CASES["flux-true-cfg"]
    pipe = case.pipeline()
    plan = Plan(cfg=Guidance(degree=2, split="batch"))
    words = "cfg=2 does not divide the denoiser's batch 1"
    with emulate(pipe, plan), pytest.raises(SplitMismatch, match=words):
        case.call(pipe)


def test_more_ranks_than_calls_says_how_many_there_are():
    case = models.CASES["flux-true-cfg"]
    pipe = case.pipeline()
    words = r"cfg=3, but a step makes 2 denoiser call.*batch of 1,.*\n.*\n.*fix: cfg=2, or cfg=1"
    with emulate(pipe, Plan(cfg=3)), pytest.raises(SplitMismatch, match=words):
        case.call(pipe)


def test_a_side_network_alone_is_no_denoiser():
    pipe = SimpleNamespace(controlnet=torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedPipeline, match="among controlnet; pass denoiser="):
        denoisers_of(pipe)
    assert set(denoisers_of(pipe, "controlnet")) == {"controlnet"}


class Writing(Euler):
    """Leaves something else where it was given a prediction."""

    def step(self, model_output, timestep, sample):
        result = super().step(model_output.clone(), timestep, sample)
        model_output.zero_()
        return result


def test_a_record_holds_predictions_as_they_were_made():
    """Damping is fitted to them, and windows are guessed from them."""
    x = torch.ones(2, 12, dtype=torch.float64)
    kept = []
    for scheduler in (Euler, Writing):
        pipe = Pipeline("flow_prediction")
        pipe.scheduler = scheduler("flow_prediction")
        kept.append(record(pipe, {"x": x}).guided)
    assert all(torch.equal(ours, plain) for ours, plain in zip(*kept, strict=True))
    assert all(guided.any() for guided in kept[1])
