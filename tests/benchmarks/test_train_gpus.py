"""Training on several GPUs: how long a sequence may be, rates, and a dry run on gloo ranks."""

import pytest
import train_gpus

from tests.benchmarks.conftest import check_format
from tests.benchmarks.torchrun import dry_ranks

# 1 GiB and 1 MiB a thousand tokens; 1 ms a thousand, and 1 us a thousand squared.
GIB = 2**30


def tried(n):
    return (n, GIB + n * 1000, n * 1e-6 + n * n * 1e-12)


def test_the_longest_length_is_the_last_power_of_two_that_fits():
    points = [tried(2**14), tried(2**15)]
    room = GIB + 2**19 * 1000 + 1
    by_memory, by_time = train_gpus.limits(points, room, 1e9, 20)
    assert by_memory == 2**19
    assert by_time == 2**24
    seconds = 20 * tried(2**17)[2]
    assert train_gpus.limits(points, room, 1.001 * seconds, 20)[1] == 2**17
    assert train_gpus.limits(points, room, 0.999 * seconds, 20)[1] == 2**16
    # No room at all: what was tried ran.
    assert train_gpus.limits(points, 0.0, 0.0, 20) == (2**15, 2**15)


@pytest.mark.parametrize(
    ("tokens", "limit"), [(4, "memory"), (8, "the budget of seconds"), (2, "--most")]
)
def test_the_result_says_what_the_limit_was(tokens, limit):
    assert train_gpus.limit_of(tokens, 4, 8).startswith(limit)


def row(name, rate, losses):
    rates = {"tokens": 8, "tokens_per_second": rate}
    rates |= {"mfu_of_data_sheet": None, "mfu_of_matmul": 0.5}
    return {"who": f"{name}/nccl", "name": name, "losses": losses, **rates}


def test_auto_is_held_against_the_best_and_losses_against_one_another():
    told = train_gpus.summary([row("ring", 100.0, [5.0, 4.0]), row("auto", 90.0, [5.5, 6.0])])
    assert told["best"] == "ring/nccl"
    assert told["auto_over_best"] == pytest.approx(0.9)
    assert told["first_loss_spread"] == pytest.approx(0.1)
    assert not told["losses_fall"]
    assert train_gpus.summary([]) == {}


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dry_run(tmp_path):
    words = ("--steps", "4", "--budget-s", "60", "--most", "512")
    result, _ = dry_ranks("train_gpus.py", tmp_path / "x.json", 2, *words)
    check_format(result)
    assert [row["name"] for row in result["rows"]] == ["ring", "auto"]
    assert [each["who"] for each in result["skipped"]] == ["usp"]
    assert result["length"]["trained"] <= 512
    summary = result["summary"]
    assert summary["losses_fall"]
    # The same weights and text under every plan.
    assert summary["first_loss_spread"] < 1e-6
    for row in result["rows"]:
        assert len(row["ms"]) == len(row["losses"]) == 4
        assert row["tokens_per_second"] > 0
        assert row["predicted_ms"] > 0
