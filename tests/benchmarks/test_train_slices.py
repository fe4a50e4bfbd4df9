"""The training slices: its judgement by arithmetic, and a dry run on real gloo ranks."""

import pytest
import train_slices

from tests.benchmarks.conftest import check_format


def row(dtype, error, ratio, losses=1e-7):
    fields = {"dtype": dtype, "gradient_error": error, "gradient_over_own": ratio}
    return fields | {"loss_difference": losses, "faster": 2.0}


def test_what_is_equal_and_what_is_not():
    right = [row("float32", 1e-6, 1e-4), row("bfloat16", 1e-2, 1.1)]
    assert train_slices.summary(right, 1e-2)["equal"]
    for wrong in (
        row("float32", 2e-5, 1e-4),
        row("float32", 1e-6, 1e-4, losses=1e-4),
        row("bfloat16", 2e-2, 1.6),
    ):
        assert not train_slices.summary([*right, wrong], 1e-2)["equal"]


def test_plans_are_those_that_exist():
    options = train_slices.parse(["--out", "x.json", "--ranks", "2"])
    assert list(train_slices.plans(options)) == ["tile", "ring", "ulysses"]
    options = train_slices.parse(["--out", "x.json"])
    assert list(train_slices.plans(options)) == ["tile", "ring", "startrail(2)", "ulysses"]
    assert (options.model, options.tokens) == ("gpt-small", 65536)


@pytest.mark.ranks
def test_a_dry_run_on_ranks(dry):
    arguments = ("--ranks", "2", "--steps", "2", "--plans", "ring", "--tokens", "131")
    found, printed = dry("train_slices.py", *arguments)
    check_format(found)
    names = [f"{who}, {dtype}" for who in ("one device", "ring") for dtype in train_slices.DTYPES]
    assert [row["who"] for row in found["rows"]] == names
    assert found["summary"]["equal"], found["summary"]
    assert 0 < found["summary"]["bf16_own_gradient_error"] < 0.1
    assert all(row["ranks_agree"] for row in found["rows"][2:])
    assert "of bfloat16's own" in printed
