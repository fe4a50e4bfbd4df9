"""A killed process: a dry run over gloo, and what counts as right."""

import kill_gpus
import pytest

from tests.benchmarks.conftest import check_format


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_dry_run(dry):
    found, printed = dry("kill_gpus.py", "--ranks", "3", "--works", "attention")
    check_format(found)
    assert found["summary"]["ok"], printed
    (row,) = found["rows"]
    assert row["killed"] == 2
    assert [survivor["exit_code"] for survivor in row["survivors"]] == [3, 3]
    assert all("rank 2" in survivor["error"] for survivor in row["survivors"])
    assert max(row["ms"]) < 1e3 * kill_gpus.TIMEOUT_S


def judged(note, end):
    told = [note, {"died": 100.0}]
    return kill_gpus.judged("nccl", "attention", told, [end, (-9, 101.0)])


NAMED = {"error": "RankLost: lost: rank 1", "time": 101.0}


@pytest.mark.parametrize(
    ("note", "end", "ok"),
    [
        (NAMED, (3, 102.0), True),
        ({"error": "RuntimeError: NCCL", "time": 101.0}, (3, 102.0), False),
        ({}, (-6, 102.0), False),
        (NAMED, (None, 200.0), False),
        (NAMED, (3, 100.0 + 2 * kill_gpus.TIMEOUT_S), False),
    ],
)
def test_a_survivor_names_the_dead_and_ends_by_itself_in_time(note, end, ok):
    assert judged(note, end)["ok"] is ok


def test_survivors_that_a_signal_ended_are_listed():
    row = judged({}, (-6, 102.0))
    assert row["by_signal"] == [0]
    assert kill_gpus.summary([row])["ended_by_signal"] == {"kill/nccl/attention": [0]}
