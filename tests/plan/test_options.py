"""Options: a frozen surface, few fields, and the bytes they declare, counted by hand."""

import dataclasses
import typing

import pytest

from stretto.errors import PlanMismatch
from stretto.plan.model import Plan
from stretto.plan.options import (
    HEADER_BYTES,
    Adaptive,
    Calibrated,
    Fixed,
    Guidance,
    GuidanceCase,
    Listed,
    Parastep,
    Steps,
    StepsCase,
    Tail,
    Windows,
)
from stretto.plan.traffic import Traffic

BRANCHES = typing.get_args(Windows)
EXAMPLES = {
    Parastep: Parastep(),
    Tail: Tail(depth=9),
    Fixed: Fixed(),
    Listed: Listed(sizes=(1, 2)),
    Calibrated: Calibrated(file="here.yaml"),
    Adaptive: Adaptive(),
}


def options_below(kind):
    """An option and every option that its fields may hold, unions walked branch by branch."""
    found = [kind]
    for hint in typing.get_type_hints(kind).values():
        for branch in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(branch):
                found += options_below(branch)
    return found


OPTIONS = [*options_below(Steps), *options_below(Guidance)]


def test_the_surface_is_frozen():
    """A new field is a decision: it is written here by hand."""
    assert {f"{kind.__name__}.{f.name}" for kind in OPTIONS for f in dataclasses.fields(kind)} == {
        "Steps.degree",
        "Steps.windows",
        "Steps.predictor",
        "Steps.walk",
        "Steps.exact_split",
        "Parastep.kind",
        "Parastep.warmup",
        "Tail.kind",
        "Tail.depth",
        "Fixed.kind",
        "Fixed.warmup",
        "Fixed.cooldown",
        "Listed.kind",
        "Listed.sizes",
        "Listed.damping",
        "Listed.grid",
        "Calibrated.kind",
        "Calibrated.file",
        "Calibrated.depth",
        "Adaptive.kind",
        "Adaptive.tolerance",
        "Guidance.degree",
        "Guidance.split",
    }


def test_the_fields_of_a_plan_are_frozen():
    """Twelve at most; a new one is a decision."""
    known = {"kind", "dp", "cp", "step", "cfg", "placement", "origin"}
    assert set(Plan.model_fields) == known


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_has_few_fields_and_forbids_others(kind):
    assert len(dataclasses.fields(kind)) <= 12
    assert kind.__pydantic_config__ == {"extra": "forbid"}
    assert kind.__doc__


def test_the_walk_meets_every_branch():
    assert set(OPTIONS) == {Steps, Guidance, *BRANCHES}
    assert set(EXAMPLES) == set(BRANCHES)


@pytest.mark.parametrize("option", [Steps(), Guidance(), *EXAMPLES.values()])
def test_options_are_values(option):
    same = dataclasses.replace(option)
    assert (same, hash(same)) == (option, hash(option))
    for field in dataclasses.fields(option):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(option, field.name, None)


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_is_tagged_by_its_own_name(kind):
    """Complaints about a plan rely on it: pydantic names classes, files name kinds."""
    assert EXAMPLES[kind].kind == kind.__name__.lower()
    assert EXAMPLES[kind].short().split()[0] == EXAMPLES[kind].kind


@pytest.mark.parametrize("make", [Steps, Guidance])
@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_is_at_least_one(make, degree):
    with pytest.raises(PlanMismatch, match=f"={degree}: a degree counts ranks"):
        make(degree=degree)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"windows": "tail"}, "windows 'tail' is a str; expected Parastep"),
        ({"windows": Tail}, "is a type; expected Parastep"),
        ({"exact_split": "no"}, "exact_split='no' is a str; expected True or False"),
    ],
)
def test_a_field_of_another_type_is_refused(fields, words):
    with pytest.raises(PlanMismatch, match=words):
        Steps(degree=2, **fields)


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (Parastep, {"warmup": 0}, "parastep: warmup=0: expected a whole number, at least 1"),
        (Parastep, {"warmup": True}, "warmup=True"),
        (Tail, {"depth": -1}, "tail: depth=-1: expected a whole number, at least 1"),
        (Tail, {"depth": 2.5}, "depth=2.5"),
        (Fixed, {"warmup": -3}, "fixed: warmup=-3: expected a whole number, at least 1"),
        (Fixed, {"cooldown": -1}, "fixed: cooldown=-1: expected a whole number, at least 0"),
        (Listed, {"sizes": ()}, "expected window sizes"),
        (Listed, {"sizes": 4}, "sizes=4: expected window sizes"),
        (Listed, {"sizes": (1, 0, 3)}, r"sizes\[1\]=0: expected a whole number, at least 1"),
        (Listed, {"sizes": (1, 2), "damping": (0.5, NAN)}, r"damping\[1\]=nan: .* from 0 to 1"),
        (Listed, {"sizes": (1, 2), "damping": (True,)}, r"damping\[0\]=True: .* from 0 to 1"),
        (Listed, {"sizes": (1, 2), "damping": 0.5}, "damping=0.5 is a float; expected a tuple"),
        (Listed, {"sizes": (1, 2), "grid": (1.5, 0.5, 0.0)}, r"grid\[0\]=1.5: .* from 0 to 1"),
        (Calibrated, {"file": ""}, "file='': expected the path of a file"),
        (Calibrated, {"file": "x.yaml", "depth": 0}, "calibrated: depth=0"),
        (Adaptive, {"tolerance": NAN}, "tolerance=nan: expected a finite number, at least 0"),
        (Adaptive, {"tolerance": -0.1}, "tolerance=-0.1"),
        (Adaptive, {"tolerance": float("inf")}, "tolerance=inf"),
    ],
)
def test_windows_without_sense_are_refused_when_built(make, fields, words):
    with pytest.raises(PlanMismatch, match=words):
        make(**fields)


def test_a_plan_from_plain_data_says_which_window_is_wrong():
    windows = {"kind": "fixed", "warmup": -3}
    with pytest.raises(PlanMismatch, match=r"step.windows.*fixed: warmup=-3"):
        Plan(step={"degree": 2, "windows": windows})


def test_the_published_schedule_brings_its_predictor():
    assert Steps(degree=2, windows=Parastep(), predictor="taylor-2").guesses == "own"
    assert Steps(degree=2, predictor="taylor-2").guesses == "taylor-2"


def test_short_names():
    assert Steps(degree=4, windows=Tail(depth=9)).short() == "step4(tail d9, damped)"
    assert Steps(degree=2, windows=Parastep(warmup=3)).short() == "step2(parastep w3, own)"
    # Its predictor is in the file.
    assert Steps(degree=2, windows=Calibrated(file="my.yaml")).short() == "step2(calibrated)"
    assert Guidance(degree=2).short() == "cfg2"
    assert Guidance(degree=2, split="calls").short() == "cfg2(calls)"


def traffic(*entries):
    found = Traffic()
    for entry in entries:
        found.add(*entry)
    return found


# ---- what steps send ---------------------------------------------------------------------------


def test_the_header_is_part_of_the_format():
    assert HEADER_BYTES == 256


def test_a_full_window_is_one_all_gather():
    """p = 4: three others get 256 + 1000 bytes per window; 8 bytes a step go to each of them."""
    sent = Steps(degree=4).wire(StepsCase(windows=(1, 4, 4), rank=2, guided_bytes=1000))
    assert sent == traffic(
        ("window", "all_gather", "step", 2 * 3 * 1256),
        ("report", "all_gather", "step", 3 * 8 * 9),
    )


@pytest.mark.parametrize(("rank", "windows"), [(0, 2), (1, 2), (2, 1), (3, 0)])
def test_a_short_window_is_a_broadcast_of_each_rank_that_has_a_position(rank, windows):
    """Sizes 2 and 3 on four ranks: rank 2 stands in one of them, rank 3 in none."""
    sent = Steps(degree=4).wire(StepsCase(windows=(1, 2, 3), rank=rank, guided_bytes=1000))
    assert sent == traffic(
        ("window", "broadcast", "step", windows * 3 * 1256),
        ("report", "all_gather", "step", 3 * 8 * 6),
    )


def test_full_and_short_windows_are_different_lanes():
    sent = Steps(degree=2).wire(StepsCase(windows=(1, 2, 1, 2), rank=1, guided_bytes=10))
    assert sent.total(phase="window") == 2 * 266
    assert [lane.verb for lane, _ in sent] == ["all_gather", "all_gather"]


@pytest.mark.parametrize(("rank", "sent"), [(0, 3 * 500), (1, 3 * 500), (2, 0), (3, 0)])
def test_an_exact_step_shared_by_fewer_ranks_is_broadcast_by_those_that_work(rank, sent):
    """A batch of 2 on four ranks: two chunks of 500 bytes, each sent to three others."""
    case = StepsCase((1,), rank, guided_bytes=500, raw_bytes=1000, chunks=2)
    assert Steps(degree=4).wire(case) == traffic(
        ("exact", "broadcast", "step", sent), ("report", "all_gather", "step", 3 * 8)
    )


def test_an_exact_step_shared_by_all_is_one_all_gather():
    case = StepsCase((1, 1, 2), 1, guided_bytes=500, raw_bytes=1000, chunks=2)
    assert Steps(degree=2).wire(case) == traffic(
        ("exact", "all_gather", "step", 2 * 500),
        ("window", "all_gather", "step", 756),
        ("report", "all_gather", "step", 8 * 4),
    )


def test_exact_steps_of_the_published_schedule_send_nothing():
    """Every rank computes them: chunks is 1, whatever one output weighs."""
    case = StepsCase((1, 1), 0, guided_bytes=500, raw_bytes=1000)
    assert Steps(degree=2, windows=Parastep()).wire(case).total() == 8 * 2


def test_one_rank_sends_nothing():
    case = StepsCase((1, 1, 1), 0, guided_bytes=1000, raw_bytes=2000)
    assert Steps().wire(case) == Traffic()


# ---- what guidance sends -----------------------------------------------------------------------


def guided(rank=0, split="batch", calls=1, evaluations=10):
    return GuidanceCase(evaluations, calls, rank, raw_bytes=600, guided_bytes=300, split=split)


@pytest.mark.parametrize(("degree", "rank"), [(2, 0), (2, 1), (3, 2)])
def test_a_cut_batch_goes_to_the_group_chunk_by_chunk(degree, rank):
    chunk = 600 // degree
    assert Guidance(degree=degree).wire(guided(rank)) == traffic(
        ("guidance", "all_gather", "cfg", 10 * (degree - 1) * chunk)
    )


def test_whole_calls_go_to_the_leader_and_its_result_comes_back():
    option = Guidance(degree=2)
    assert option.wire(guided(0, "calls", calls=2)) == traffic(
        ("guidance", "broadcast", "cfg", 10 * 300)
    )
    assert option.wire(guided(1, "calls", calls=2)) == traffic(
        ("guidance", "permute", "cfg", 10 * 600)
    )


@pytest.mark.parametrize(("rank", "own"), [(1, 2), (2, 1)])
def test_calls_are_dealt_round_robin(rank, own):
    """Five calls on three ranks: 0 and 3, 1 and 4, 2."""
    sent = Guidance(degree=3).wire(guided(rank, "calls", calls=5))
    assert sent.total() == 10 * own * 600
    leader = Guidance(degree=3).wire(guided(0, "calls", calls=5))
    assert leader == traffic(("guidance", "broadcast", "cfg", 10 * 2 * 300))


@pytest.mark.parametrize("split", ["batch", "calls"])
def test_guidance_on_one_rank_sends_nothing(split):
    assert Guidance().wire(guided(0, split, calls=2)) == Traffic()


def test_no_evaluations_send_nothing():
    assert Guidance(degree=2).wire(guided(evaluations=0)) == Traffic()
