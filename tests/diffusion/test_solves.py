"""What a step solves without an answer has the bits of what it solves with one."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler

from stretto.diffusion.api import emulate, parallelized
from stretto.diffusion.scheduler import SchedulerPort
from stretto.diffusion.solves import Solves
from stretto.errors import NonFinite
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.testing import models

META = torch.device("meta")
UPDATES = {"multistep_uni_p_bh_update", "multistep_uni_c_bh_update"}


class Solving:
    """As far as it matters, a scheduler."""

    def solved(self, matrix, *, twice=True):
        doubled = 2 * matrix if twice else matrix
        return torch.linalg.solve(doubled, torch.ones(2))


def on_every_device(monkeypatch):
    on = Solves.on
    monkeypatch.setattr(Solves, "on", lambda self, device: on(self, META))


def test_methods_are_found_by_what_they_call():
    assert Solves(UniPCMultistepScheduler()).on(META).keys() == UPDATES
    assert Solves(EulerDiscreteScheduler()).on(META) == {}
    assert Solves(UniPCMultistepScheduler()).on(torch.device("cpu")) == {}


def test_what_the_instance_replaces_stays():
    scheduler = UniPCMultistepScheduler()
    solves = Solves(scheduler)
    scheduler.multistep_uni_c_bh_update = lambda *args, **kwargs: None
    assert solves.on(META).keys() == {"multistep_uni_p_bh_update"}


def test_a_lent_method_has_defaults_and_the_same_result(monkeypatch):
    scheduler, matrix = Solving(), torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    expected = scheduler.solved(matrix), scheduler.solved(matrix, twice=False)
    solves = Solves(scheduler)
    solved = solves.on(META)["solved"]
    monkeypatch.setattr(torch.linalg, "solve", lambda *_: pytest.fail("the device was asked"))
    assert torch.equal(solved(matrix), expected[0])
    assert torch.equal(solved(matrix, twice=False), expected[1])
    solves.check()


def test_a_singular_matrix_is_told_once_at_the_end():
    solves = Solves(Solving())
    solved = solves.on(META)["solved"]
    solved(torch.eye(2))
    solved(torch.ones(2, 2))
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular\n.*levels.*\n.*to fix"):
        solves.check()
    solves.check()
    solved(torch.ones(2, 2))
    solves.forget()
    solves.check()


@pytest.mark.parametrize("name", ["sd15-unipc", "wan-unipc"])
def test_steps_have_the_bits_they_had(name, monkeypatch):
    case = models.CASES[name]
    pipe = case.pipeline()
    expected = case.call(pipe)
    on_every_device(monkeypatch)
    monkeypatch.setattr(torch.linalg, "solve", lambda *_: pytest.fail("the device was asked"))
    with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0)):
        assert torch.equal(case.call(pipe), expected)
    assert not UPDATES & vars(pipe.scheduler).keys()


@pytest.mark.parametrize("plan", [Plan(), Plan(step=2)], ids=str)
@pytest.mark.parametrize(("level", "error"), [(5, NonFinite), (7, torch.linalg.LinAlgError)])
def test_levels_that_do_not_fall_are_told(plan, level, error, monkeypatch):
    """In the middle by the prediction that follows, at the end by the answer."""
    case = models.CASES["sd15-unipc"]
    pipe = case.pipeline()
    expected, begin = case.call(pipe), UniPCMultistepScheduler.set_timesteps

    def repeating(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.sigmas[level] = self.sigmas[level - 2]

    with monkeypatch.context() as broken:
        broken.setattr(UniPCMultistepScheduler, "set_timesteps", repeating)
        with pytest.raises(torch.linalg.LinAlgError):
            case.call(pipe)
        on_every_device(broken)
        with emulate(pipe, plan), pytest.raises(error, match="do not fall"):
            case.call(pipe)
    assert torch.equal(case.call(pipe), expected)


def test_what_an_aborted_call_left_is_not_the_next_ones(monkeypatch):
    case = models.CASES["sd15-unipc"]
    pipe = case.pipeline()
    on_every_device(monkeypatch)
    solve_ex = torch.linalg.solve_ex

    def singular(matrix, right):
        return solve_ex(matrix, right)[0], torch.ones((), dtype=torch.int32)

    def fail(pipe, step, timestep, kept):
        if step == 5:
            raise ArithmeticError("no such luck")
        return kept

    with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0)):
        with monkeypatch.context() as broken:
            broken.setattr(torch.linalg, "solve_ex", singular)
            with pytest.raises(ArithmeticError):
                case.call(pipe, callback_on_step_end=fail)
        case.call(pipe)


@pytest.mark.gpu
def test_the_host_waits_in_no_step_on_a_gpu(monkeypatch):
    case = models.CASES["sd15-unipc"]
    pipe = case.pipeline()
    pipe.to("cuda")
    expected, stepped, steps = case.call(pipe), SchedulerPort._stepped, []

    def unwaiting(self, call):
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.append(stepped(self, call))
            return steps[-1]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(SchedulerPort, "_stepped", unwaiting)
    with parallelized(pipe, Plan(), mesh=LocalWorld({}, device="cuda").mesh(0)):
        assert torch.equal(case.call(pipe), expected)
    assert len(steps) == case.steps
