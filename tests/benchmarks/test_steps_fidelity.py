"""The fidelity benchmark: its depths, and a dry run with a few training steps."""

import pytest
import steps_fidelity

from tests.benchmarks.conftest import check_format


def test_depths_are_those_of_the_published_schedule():
    assert steps_fidelity.depths(50, 8) == [8, 11, 15, 18]
    assert steps_fidelity.depths(4, 4) == [2, 3]


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_dry_run(dry):
    words = ("--data", "digits", "--train-steps", "4", "--train-batch", "4", "--width", "16")
    small = ("--layers", "1", "--heads", "2", "--batch", "2", "--steps", "10", "--shifts", "3")
    result, _ = dry("steps_fidelity.py", *words, *small, "--degrees", "2,4")
    check_format(result)
    rows = result["rows"]
    sequential = next(row for row in rows if row["who"] == "sequential")
    assert sequential["psnr_db"] is None
    parallel = [row for row in rows if "degree" in row]
    assert {row["who"] for row in parallel} >= {"parastep", "tail"}
    for row in parallel:
        assert sum(row["windows"]) == 10
        assert len(row["windows"]) == row["depth"]
    for line in result["summary"]["equal_depth_psnr_db"]:
        assert {"tail", "parastep", "fewer steps"} <= line.keys()
    assert result["training"]["parameters"] > 0
