"""The exchange benchmark's own path, over gloo on the CPU."""

import pytest

from tests.benchmarks.conftest import check_format

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_every_case_is_right_and_its_culprit_named(dry):
    found, _ = dry("mesh_exchange.py", "--ranks", "3")
    check_format(found)
    assert found["summary"]["ok"], found["summary"]
    assert {row["verb"] for row in found["rows"]} == {"shift", "all_to_all"}
    assert all(row["ms"] > 0 for row in found["rows"])
