"""The overhead benchmark: pairs in turns, and a dry run of every case."""

import pytest
import steps_overhead
import torch

from tests.benchmarks.conftest import check_format

SMALL = ("--width", "16", "--layers", "1", "--heads", "2", "--batch", "2", "--pairs", "1")


def test_pairs_alternate_who_goes_first():
    order = []
    steps_overhead.pairs(
        lambda: order.append("a"), lambda: order.append("b"), 2, torch.device("cpu")
    )
    assert order == ["a", "b", "a", "b", "b", "a"]


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
        assert replay["windows"] == [1] + [4] * (steps_overhead.DEPTH - 1)
    assert rows["batch curve/dit"]["over_one"]["1"] == 1.0
    assert set(rows["batch curve/audioldm2"]["over_one"]) == {"half", *map(str, range(1, 9))}
    assert result["summary"]["recompiles"] == 0
