"""The exactness matrix: every pipeline x scheduler case against itself, bit for bit.

Oracles O1-O3 and O9 of step parallelism, each with a mutation that must fail it.
"""

import pytest
import torch

from stretto.diffusion.api import emulate
from stretto.diffusion.handover import Handover
from stretto.diffusion.randomness import Randomness
from stretto.diffusion.scheduler import SchedulerPort
from stretto.plan.model import Plan
from stretto.plan.options import Fixed, Guidance, Listed, Steps
from stretto.search import windows
from stretto.testing import models
from stretto.testing.exactness import (
    DEGREES,
    Oracle,
    counted,
    declared,
    emulated,
    on_ranks,
    oracle_is_exact,
    reference,
)
from stretto.testing.ranks import run_ranks

ALL = {**models.CASES, **models.OTHERS}
QUICK = ("sd15-ddim", "sd15-unipc", "sd15-inpaint", "sd3-flow", "wan-unipc", "cogvideox-dpm")
GUIDED = [name for name, case in ALL.items() if case.guidance != "none"]


def lanes(names):
    """Representatives in the plain lane, the whole matrix in the ranks lane."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.ranks) for name in names]


@pytest.mark.parametrize("name", lanes(ALL))
def test_exact_where_it_must_be(name):
    """O1 and O2: degree 1 and perfect guesses reproduce the plain pipeline bitwise."""
    case = ALL[name]
    known = reference(case)
    assert known.degree_one, "hooks with one rank changed the result"
    assert known.restored, "leaving the context did not restore the pipeline"
    exact = {degree: oracle_is_exact(case, known, degree) for degree in DEGREES}
    assert exact == dict.fromkeys(DEGREES, True)


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        ("no restore", "sd15-pndm"),
        ("no random state", "sd15-euler-ancestral"),
        ("stale sample", "sd3-flow"),
        ("stale extras", "cogvideox-dpm"),
    ],
)
def test_the_oracle_notices(mutation, name, monkeypatch):
    """A broken replay must fail O2, or the matrix above proves nothing."""
    case = ALL[name]
    known = reference(case)
    if mutation == "no restore":
        monkeypatch.setattr(SchedulerPort, "restore", lambda self, state: None)
    elif mutation == "no random state":
        monkeypatch.setattr(Randomness, "restore", lambda self, states: None)
    elif mutation == "stale sample":
        monkeypatch.setattr(Handover, "continued", lambda self, call, result: call)
    else:
        monkeypatch.setattr("stretto.diffusion.handover.extras_of", lambda result: ())
    assert not oracle_is_exact(case, known, 3)


@pytest.mark.parametrize("name", lanes(GUIDED))
def test_guidance_is_exact(name):
    """O9: whole calls bitwise; cut batches up to the round-off of other matrix shapes."""
    case = ALL[name]
    pipe = case.pipeline()
    plain = case.call(pipe)
    with emulate(pipe, Plan(cfg=2)) as run:
        first, second = case.call(pipe), case.call(pipe)
    assert torch.equal(first, second)
    if case.guidance == "calls":
        assert torch.equal(first, plain)
    else:
        assert (first - plain).norm() <= 1e-5 * plain.norm()
    assert len(run.reports) == 2


def plans_for_ranks():
    return {
        "step3": Plan(step=Steps(degree=3, exact_split=False)),
        "cfg2": Plan(cfg=2),
        "step2 cfg2": Plan(step=2, cfg=2),
    }


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("label", plans_for_ranks())
def test_ranks_equal_the_emulation(label):
    """O3: gloo processes, bitwise; evaluations as planned; counted bytes as declared."""
    plan = plans_for_ranks()[label]
    names = list(ALL) if plan.cfg.degree == 1 else GUIDED
    outcomes = run_ranks(on_ranks, plan.sizes, names, plan, timeout_s=500)
    wrong = []
    for name in names:
        output, reports = emulated(ALL[name], plan)
        for rank, outcome in enumerate(outcomes):
            mine, virtual = outcome[name], reports[rank]
            if not torch.equal(mine["output"], output):
                wrong.append(f"{name} rank {rank}: output")
            if mine["evaluations"] != virtual.evaluations or mine["structure_calls"]:
                wrong.append(f"{name} rank {rank}: {mine['evaluations']} evaluations")
            undeclared = mine["walk"] == "leader" or plan.cfg.degree > 1
            if not undeclared and mine["traffic"] != mine["declared"]:
                wrong.append(f"{name} rank {rank}: {mine['traffic']} != {mine['declared']}")
    assert not wrong


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_calls_are_those_of_the_plan(degree):
    """Counted by the model itself, not by the hooks."""
    case = ALL["sd15-ddim"]
    pipe = case.pipeline()
    with emulate(pipe, Plan(step=Steps(degree=degree, exact_split=False))) as run:
        case.call(pipe)
        with counted(pipe) as seen:
            case.call(pipe)
    planned = [windows.calls(run.report.sizes, rank) for rank in range(degree)]
    assert [r.evaluations for r in run.reports] == planned
    assert seen["unet"] == sum(planned)


@pytest.mark.parametrize(
    "option",
    [
        Fixed(warmup=2, cooldown=2),
        Listed(sizes=(1, 3, 1, 2, 1)),
        Listed(sizes=(1,) * 8),
    ],
    ids=lambda option: option.short(),
)
def test_any_windows_are_exact_with_perfect_guesses(option):
    """O6: remainders, windows shorter than the degree, all-ones."""
    case = ALL["sd15-euler-ancestral"]
    known = reference(case)
    plan = Plan(step=Steps(degree=3, windows=option, exact_split=False))
    oracles = [Oracle(known.guided) for _ in range(3)]
    with emulate(known.pipe, plan, predictors=oracles):
        assert torch.equal(case.call(known.pipe), known.output)


def test_an_exact_step_is_shared_by_the_step_ranks():
    """exact_split: batched guidance of an exact step is cut over two of three step ranks."""
    case = ALL["sd15-ddim"]
    pipe = case.pipeline()
    plain = case.call(pipe)
    ones = Listed(sizes=(1,) * case.steps)
    with emulate(pipe, Plan(step=Steps(degree=3, windows=ones))) as run:
        output = case.call(pipe)
    assert (output - plain).norm() <= 1e-5 * plain.norm()
    # Step 0 is whole on every rank: the form of its output is not known yet.
    assert [r.evaluations for r in run.reports] == [8, 8, 1]


@pytest.mark.parametrize(
    ("degree", "verbs"), [(2, [{"all_gather"}] * 2), (3, [{"broadcast"}, {"broadcast"}, set()])]
)
def test_a_shared_step_is_gathered_where_every_rank_has_a_part(degree, verbs):
    """Two rows on two ranks are one collective; on three, two ranks tell the third theirs."""
    case = ALL["sd15-ddim"]
    pipe = case.pipeline()
    ones = Listed(sizes=(1,) * case.steps)
    with emulate(pipe, Plan(step=Steps(degree=degree, windows=ones))) as run:
        case.call(pipe)
    exact = [[lane for lane, _ in r.traffic if lane.phase == "exact"] for r in run.reports]
    assert [{lane.verb for lane in lanes} for lanes in exact] == verbs


@pytest.mark.parametrize("degree", [2, 3])
def test_bytes_of_shared_exact_steps(degree):
    """Once the form of outputs is known the first step is shared too: counted is declared."""
    case = ALL["sd15-ddim"]
    pipe = case.pipeline()
    with emulate(pipe, Plan(step=degree)) as run:
        case.call(pipe)
        case.call(pipe)
    for rank, report in enumerate(run.reports):
        raw_bytes = 2 * report.guided_bytes
        assert report.traffic == declared(report, rank, raw_bytes=raw_bytes, chunks=2)


def test_a_call_that_failed_leaves_ranks_alike():
    """Otherwise one would share the first step of the next call and another evaluate it whole."""
    case = ALL["sd15-ddim"]
    pipe = case.pipeline()
    plain, calls = pipe.unet.forward, []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("no such luck")
        return plain(*args, **kwargs)

    pipe.unet.forward = broken
    with emulate(pipe, Plan(step=2), timeout_s=5) as run:
        with pytest.raises(ArithmeticError):
            case.call(pipe)
        case.call(pipe)
    assert [r.num_steps for r in run.reports] == [case.steps] * 2


def test_branches_of_one_call_each():
    case = ALL["wan-flow"]
    pipe = case.pipeline()
    plain = case.call(pipe)
    with emulate(pipe, Plan(cfg=Guidance(degree=2, split="calls"))) as run:
        assert torch.equal(case.call(pipe), plain)
        assert torch.equal(case.call(pipe), plain)
    assert [r.evaluations for r in run.reports] == [8, 8]
