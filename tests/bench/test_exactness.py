"""The exactness table: what it says of a right case, a refused one, and of each kind of wrong."""

import pytest
import torch

from stretto.bench import exactness
from stretto.diffusion.scheduler import SchedulerPort
from stretto.errors import ConfigError, NonFinite, UnsupportedPipeline
from stretto.plan.model import Plan
from stretto.plan.options import Steps
from stretto.testing import models
from stretto.testing.exactness import Reference, emulated


def stand_in(case, plan, **changes):
    """What every rank would return, by emulation; `changes` replace fields on the last rank."""
    output, reports = emulated(case, plan)
    outcomes = [
        {
            "output": output,
            "counted": report.evaluations,
            "evaluations": report.evaluations,
            "structure_calls": 0,
            "sizes": report.sizes,
            "traffic": "as declared",
            "declared": "as declared",
            "walk": report.walk,
        }
        for report in reports
    ]
    outcomes[-1] |= changes
    return outcomes


@pytest.fixture
def ranks(monkeypatch):
    """No processes: ranks are played by emulation. Returns the changes of the last rank."""
    changes = {}

    def run(body, sizes, names, plan, timeout_s):
        found = {}
        for name in names:
            case = {**models.CASES, **models.OTHERS}[name]
            own = changes if plan.cfg.degree == 1 else {}
            found[name] = stand_in(case, plan, **own)
        count = plan.world_size
        return [{name: found[name][rank] for name in names} for rank in range(count)]

    monkeypatch.setattr(exactness, "run_ranks", run)
    return changes


@pytest.fixture
def right_alone(monkeypatch):
    """What one process finds is taken as right, so that only ranks are looked at."""

    def found(case):
        return Reference(case.pipeline(), torch.zeros(1), degree_one=True, restored=True)

    monkeypatch.setattr(exactness, "reference", found)
    monkeypatch.setattr(exactness, "oracle_is_exact", lambda *args: True)


def test_a_right_case_is_exact(ranks):
    told = []
    found = exactness.run(["sd15-ddim"], say=lambda *args: told.append(args))
    (row,) = found["rows"]
    assert row["verdict"] == "exact"
    assert row["walk"] == "replay"
    assert [row[f"perfect p={p}"] for p in (2, 3, 4)] == [True] * 3
    assert sum(row["evaluations"]) > models.CASES["sd15-ddim"].steps
    assert row["bytes = declared"]
    assert row["cfg ranks = emulation"]
    assert 0 <= row["cfg error"] <= exactness.CUT_ERROR
    assert found["summary"] == {"cases": 1, "exact": 1, "refused": 0, "wrong": 0}
    assert told[0] == ("sd15-ddim", 0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": torch.zeros(1)}, "differ from the emulation"),
        ({"counted": 99}, "evaluations (4, 4, 99) of (4, 4, 2)"),
        ({"traffic": "more"}, "bytes counted are not those declared"),
    ],
    ids=["output", "evaluations", "bytes"],
)
def test_a_wrong_rank_is_wrong(ranks, right_alone, change, words):
    ranks.update(change)
    (row,) = exactness.run(["sd15-ddim"])["rows"]
    assert row["verdict"] == "wrong"
    assert words in row["wrong"]


def test_a_broken_replay_is_wrong(ranks, monkeypatch):
    monkeypatch.setattr(SchedulerPort, "restore", lambda self, state: None)
    found = exactness.run(["sd15-pndm"])
    assert found["summary"]["wrong"] == 1
    assert "perfect guesses differ at p = 3" in found["rows"][0]["wrong"]


def test_a_refusal_is_counted_with_its_reason(ranks, monkeypatch):
    def refuse(case):
        raise UnsupportedPipeline("it edits latents")

    monkeypatch.setattr(exactness, "reference", refuse)
    found = exactness.run(["sd15-ddim"])
    assert found["summary"] == {"cases": 1, "exact": 0, "refused": 1, "wrong": 0}
    assert found["rows"][0]["refused"] == "it edits latents"


def test_another_error_is_no_refusal(ranks, monkeypatch):
    def fail(case):
        raise NonFinite("NaN at step 3")

    monkeypatch.setattr(exactness, "reference", fail)
    found = exactness.run(["sd15-ddim"])
    assert found["rows"][0]["wrong"] == "NonFinite: NaN at step 3"


def test_refusals_of_only_some_ranks_are_wrong(ranks, right_alone):
    ranks["refused"] = "not here"
    (row,) = exactness.run(["sd15-ddim"])["rows"]
    assert "some ranks refused, others went on" in row["wrong"]


def test_unknown_case_names_the_near_ones():
    with pytest.raises(ConfigError, match=r"no case 'sd15-dim'.*sd15-ddim"):
        exactness.chosen(["sd15-dim"])


def test_every_case_is_chosen_by_default_and_a_name_only_once():
    assert len(exactness.chosen(())) == len(models.CASES) + len(models.OTHERS) >= 24
    assert len(exactness.chosen(["sd15-ddim", "sd15-ddim"])) == 1


def test_calls_are_those_of_arithmetic():
    case = models.CASES["wan-flow"]  # two calls a step, one per branch of guidance
    plan = Plan(step=Steps(degree=3, exact_split=False))
    _, reports = emulated(case, plan)
    planned = exactness.planned_calls(case, reports[0].sizes, 3)
    assert planned == tuple(report.evaluations for report in reports)


@pytest.mark.ranks
def test_on_real_ranks():
    found = exactness.run(["sd15-euler", "sd15-inpaint"], ranks=2)
    assert [row["verdict"] for row in found["rows"]] == ["exact", "exact"]
    assert [row["walk"] for row in found["rows"]] == ["replay", "leader"]
