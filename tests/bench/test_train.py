"""The train benchmark: its summaries by arithmetic, its cases, and all of it once, tiny."""

import pytest

from stretto.bench import train, train_runs, train_speed
from stretto.bench.train_speed import Lap, Method


def lap(*seconds, loss=2.0):
    return Lap(list(seconds), [s / 2 for s in seconds], [loss] * len(seconds))


def row(who, laps, alone, **more):
    return train_speed._row(Method(who, **more), train.FULL.race, laps, alone)


@pytest.fixture
def rows():
    alone = lap(2.0, 2.0, 2.0)
    return [
        row("1 rank", [alone, Lap()], alone),
        row("2 ranks, fsdp", [lap(1.0, 1.0, 1.0), lap(1.25, 1.25, 1.0)], alone),
        row("2 ranks, ring", [lap(1.6, 1.6, 1.6, loss=2.0002)] * 2, alone),
        row("2 ranks, auto", [lap(1.6, 1.6, 1.6)] * 2, alone),
        row("independent runs", [lap(2.0, 2.5, 2.5)] * 2, alone, together=True),
        row("1 rank, 2 threads", [lap(1.0, 1.0, 1.0), Lap()], alone, threads=2),
    ]


def test_a_step_is_done_when_its_last_rank_is(rows):
    assert rows[1]["seconds"] == [1.25, 1.25, 1.0]
    assert rows[1]["speedup"] == 2.0 / 1.25
    assert rows[1]["speedup_pairs"]["high"] == 2.0
    assert rows[1]["tokens_per_second"] == 2 * 4096 / 1.25
    assert rows[2]["loss_difference"] == pytest.approx(1e-4)


def test_the_ceiling_is_what_two_independent_runs_reach(rows):
    found = train_speed.summary(rows)
    assert found["ceiling_2ranks"] == 2 * 2.0 / 2.5
    assert (found["speedup_2ranks"], found["speedup_2ranks_by"]) == (1.6, "2 ranks, fsdp")
    assert found["of_ceiling"] == 1.0
    assert found["faster_than_one"]


def test_a_loss_that_differs_is_not_right():
    good = {"losses_within_1e_9": True, "killed_rank_named": True, "resume_bitwise": True}
    assert train.is_right(good)
    for name in good:
        assert not train.is_right(good | {name: False})


def test_cases_are_what_the_brief_names():
    found = train_runs.cases(2, (1, 2, 4))
    names = {(case.plan.world_size, case.who) for case in found}
    assert {(1, "one rank"), (2, "ring"), (2, "auto"), (4, "startrail(2)"), (4, "auto")} <= names
    assert (2, "startrail(2)") not in names
    assert {case.recipe.descent.optimizer for case in found} == {"sgd", "adamw"}
    assert {case.recipe.dtype for case in found} == {"float64"}


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_of_it_once(tmp_path):
    kept = []
    found = train.run(train.QUICK, keep=kept.append)
    assert found["complete"]
    assert train.is_right(found["summary"])
    assert found["summary"]["max_loss_difference_fp64"] <= 1e-12
    assert {row["part"] for row in found["rows"]} == {"speed", "lost rank", "losses"}
    assert len(kept) == 2
