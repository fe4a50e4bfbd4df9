"""The overhead benchmark: pairs in turns, and a dry run of every case."""

import functools
from contextlib import nullcontext
from functools import partial

import pytest
import steps_overhead
import torch

from stretto import Plan, Steps, parallelized
from stretto.plan.options import Fixed
from tests.benchmarks.conftest import check_format

SMALL = ("--width", "16", "--layers", "1", "--heads", "2", "--batch", "2", "--pairs", "1")


def test_rounds_take_all_comparisons_and_alternate_who_goes_first():
    order = []

    def comparison(who):
        works = {name: partial(nullcontext, partial(order.append, who + name)) for name in "ab"}
        return steps_overhead.Comparison(who, who.upper(), works, {"fact": 1}, lambda times: times)

    both = [comparison("x"), comparison("y")]
    *_, rows = steps_overhead.in_rounds(both, 2, torch.device("cpu"), order.append)
    warmed = ["X", "xa", "xb", "Y", "ya", "yb"]
    assert order == [*warmed, *warmed, "X", "xb", "xa", "Y", "yb", "ya"]
    assert [(row["who"], row["fact"], len(row["a"])) for row in rows] == [("x", 1, 2), ("y", 1, 2)]


def test_rounds_on_a_slow_host_are_told_apart():
    def row(who, gauges, values):
        spread = steps_overhead.result.spread(values)
        return {"who": who, "gauge_ms": gauges, "added_percent": spread}

    calm = {"free": [1.0, 1.1, 1.0], "ours": [1.2, 1.0, 1.0]}
    # The second round found the host slow beside one of two pieces, the third beside both.
    slow = {"free": [1.0, 1.0, 3.0], "ours": [1.0, 1.4, 2.9]}
    rows = [row("x", calm, [1.0, 2.0, 3.0]), row("y", slow, [1.0, 20.0, 30.0])]
    never = {"free": [2.0], "ours": [1.0]}
    rows += [row("z", never, [9.0]), {"who": "batch curve/dit"}]
    steps_overhead.mark_quiet(rows)
    assert [each.get("quiet") for each in rows] == [
        [True, True, True],
        [True, False, False],
        [False],
        None,
    ]
    medians = [each["added_percent"]["quiet_median"] for each in rows[:3]]
    assert medians == [2.0, 1.0, None]
    assert rows[1]["added_percent"]["median"] == 20.0


def test_a_free_run_evaluates_as_often_as_windows(tmp_path):
    words = ["--out", str(tmp_path / "x.json"), "--dry", *SMALL]
    bench = steps_overhead.Bench(steps_overhead.parse(words))
    bench.use("DDIM")
    evaluated, forward = [], bench.pipe.transformer.forward
    bench.pipe.transformer.forward = lambda *a, **k: evaluated.append(1) or forward(*a, **k)
    with steps_overhead.free(bench, 9, 4) as work:
        work()
    assert len(evaluated) == 3


def test_replay_is_walked_by_the_last_rank_which_guesses_most(tmp_path, monkeypatch):
    words = ["--out", str(tmp_path / "x.json"), "--dry", *SMALL]
    bench = steps_overhead.Bench(steps_overhead.parse(words))
    bench.use("FlowMatchEuler")
    kind, stepped = type(bench.pipe.scheduler), []
    step = kind.step

    @functools.wraps(step)
    def counting(*args, **kwargs):
        stepped.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(kind, "step", counting)
    plan = Plan(step=Steps(degree=4, windows=Fixed(warmup=1), exact_split=False))
    mesh = steps_overhead.EchoMesh(plan.sizes, torch.device("cpu"))
    assert mesh.rank("step") == 3
    with parallelized(bench.pipe, plan, mesh=mesh):
        bench.call(9)
    # An exact step, then two windows: three guesses on the way to the own position, four true.
    assert len(stepped) == 1 + 2 * (3 + 4)


def test_inputs_are_repeated_and_cut_along_the_batch_only():
    x = torch.arange(4).view(2, 2)
    assert steps_overhead.fit(x, 2, 3).tolist() == [[0, 1], [2, 3], [0, 1]]
    assert steps_overhead.fit(x, 3, 6) is x
    assert steps_overhead.fit(None, 2, 3) is None


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_dry_run(dry):
    words = ("--degrees", "4", "--repeats", "1", "--curves", "dit,audioldm2", "--compile")
    result, _ = dry("steps_overhead.py", *SMALL, *words)
    check_format(result)
    rows = {row["who"]: row for row in result["rows"]}
    for name in steps_overhead.SCHEDULERS:
        assert rows[f"hooks/{name}"]["bitwise"]
        replay = rows[f"replay/{name}/p4"]
        assert replay["windows"] == [1] + [4] * 12
        assert set(replay["gauge_ms"]) == {"plain", "free", "as_many", "ours"}
        assert replay["quiet"] in ([True], [False])
    assert rows["batch curve/dit"]["over_one"]["1"] == 1.0
    assert set(rows["batch curve/audioldm2"]["over_one"]) == {"half", *map(str, range(1, 9))}
    assert result["summary"]["recompiles"] == 0
