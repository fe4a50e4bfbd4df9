"""What is handed in by mistake is named, before anything is hooked."""

import pytest

from stretto.diffusion.api import emulate, parallelized
from stretto.errors import ConfigError, PlanMismatch, UnsupportedPipeline
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.testing import models

DDIM = models.CASES["sd15-ddim"]


class Newest:
    """A predictor in full."""

    needs_own_output = False

    def reset(self):
        self.last = None

    def append(self, s, g):
        self.last = g

    def close_window(self, start, size):
        """Nothing to fit."""

    def guesses(self, noise):
        return [self.last] * len(noise)


@pytest.fixture(scope="module")
def pipe():
    return DDIM.pipeline()


@pytest.mark.parametrize("plan", [3, None, {"step": 2}], ids=str)
def test_what_is_no_plan(pipe, plan):
    with pytest.raises(ConfigError, match=f"is a {type(plan).__name__}, no plan"):
        emulate(pipe, plan).__enter__()
    with pytest.raises(ConfigError, match="no plan"):
        parallelized(pipe, plan, mesh=LocalWorld({}).mesh(0)).__enter__()


def test_a_plan_to_train(pipe):
    with pytest.raises(PlanMismatch, match="a plan to train for a pipeline"):
        emulate(pipe, Plan(kind="train", cp=2)).__enter__()


@pytest.mark.parametrize("other", [None, "model", "unet"])
def test_what_is_no_pipeline(pipe, other):
    wrong = pipe.unet if other == "unet" else other
    with pytest.raises(UnsupportedPipeline, match="is no pipeline of denoising steps"):
        emulate(wrong, Plan(step=2)).__enter__()
    with pytest.raises(UnsupportedPipeline, match="is no pipeline of denoising steps"):
        parallelized(wrong, Plan(), mesh=LocalWorld({}).mesh(0)).__enter__()


def test_what_is_no_mesh(pipe):
    with pytest.raises(ConfigError, match="is a NoneType, no mesh"):
        parallelized(pipe, Plan(), mesh=None).__enter__()


@pytest.mark.parametrize(
    ("predictors", "message"),
    [
        ([Newest()], "predictors: 1 for 2 virtual ranks"),
        ((Newest() for _ in range(2)), "predictors: generator for 2 virtual ranks"),
        ([Newest(), 3], "a int as predictor lacks reset, append, close_window, guesses, needs_own"),
    ],
)
def test_predictors_that_do_not_fit(pipe, predictors, message):
    with pytest.raises(ConfigError, match=message):
        emulate(pipe, Plan(step=2), predictors=predictors).__enter__()


def test_one_predictor_for_this_rank(pipe):
    mesh = LocalWorld({}).mesh(0)
    with pytest.raises(ConfigError, match="a str as predictor lacks reset"):
        parallelized(pipe, Plan(), mesh=mesh, predictor="repeat").__enter__()


def test_a_predictor_in_full_is_taken(pipe):
    with emulate(pipe, Plan(step=2), predictors=[Newest(), Newest()]) as run:
        DDIM.call(pipe)
    assert run.report.num_steps == DDIM.steps


def test_a_predictor_that_guesses_too_few_steps(pipe):
    class Few(Newest):
        def guesses(self, noise):
            return [self.last]

    with (
        pytest.raises(ConfigError, match=r"Few.guesses returned 1 predictions for 2 steps"),
        emulate(pipe, Plan(step=3), predictors=[Few() for _ in range(3)]),
    ):
        DDIM.call(pipe)
