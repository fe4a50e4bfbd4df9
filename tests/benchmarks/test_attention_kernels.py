"""The kernel benchmark: a dry run of every section, and that a failing case is a row."""

import argparse

import attention_kernels
import pytest
import torch

from tests.benchmarks.conftest import check_format


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_dry_run(dry):
    result, printed = dry("attention_kernels.py", "--sections", "check,merge,path,blocks,plans")
    check_format(result)
    summary = result["summary"]
    assert summary["errors"] == []
    assert summary["checks_wrong"] == []
    assert summary["skipped"] == 0
    assert summary["checks_ok"] == sum("ok" in row for row in result["rows"])
    sections = {row["who"].split("/")[0] for row in result["rows"]}
    assert sections == set(attention_kernels.SECTIONS)
    plans = {row["who"].split("/")[1] for row in result["rows"] if row["who"].startswith("plans")}
    assert {"ring", "ulysses", "startrail(2)", "tile(2)", "kv-allgather"} <= plans
    for row in result["rows"]:
        assert row["who"] in printed
        if row["who"].startswith("path"):
            assert row["rms_to_torch"] < 1e-5
            assert row["bits_of_torch"]


def bench(seconds=60.0):
    options = argparse.Namespace(dry=True, seconds=seconds, backends=["cpu"])
    return attention_kernels.Bench(options)


def test_a_failing_case_is_a_row_with_its_error():
    def fail():
        raise RuntimeError("no kernel")

    row = attention_kernels.attempt(bench(), "path/x", fail)
    assert row["who"] == "path/x"
    assert row["error"] == "RuntimeError: no kernel"
    assert attention_kernels.summary([row])["errors"] == ["path/x"]


def test_cases_after_the_deadline_are_skipped_and_say_so():
    late = bench(seconds=0.0)
    row = attention_kernels.attempt(late, "path/x", lambda: pytest.fail("ran"))
    assert row["skipped"] == "past 0.0 s"
    assert attention_kernels.summary([row])["skipped"] == 1


def test_a_wrong_result_would_be_a_wrong_check(monkeypatch):
    right = attention_kernels.merged
    cases = dict(attention_kernels.checks(bench()))
    who = "check/cpu/float64/causal/8:2/d64"
    assert cases[who]()["ok"]

    def off_by_a_little(*args):
        out, *rest = right(*args)
        return [out * (1 + 1e-9), *rest]

    monkeypatch.setattr(attention_kernels, "merged", off_by_a_little)
    row = cases[who]()
    assert not row["ok"]
    assert row["ratios"]["out"] > 1 > row["ratios"]["dq"]


def test_flop_of_a_causal_square_is_half_and_backward_is_five_products_to_two():
    full = attention_kernels.flop(8, 8, 2, 4, "full", False)
    assert full == 4 * 8 * 8 * 2 * 4
    assert attention_kernels.flop(8, 8, 2, 4, "causal", False) == full / 2
    assert attention_kernels.flop(8, 8, 2, 4, "full", True) == 2.5 * full


def test_rows_come_together_as_they_were_cut():
    x = torch.arange(24.0).view(1, 1, 12, 2)
    rows = (attention_kernels.Spans(((0, 3), (9, 12))), attention_kernels.Spans(((3, 9),)))
    parts = tuple(attention_kernels.rows_of(x, spans) for spans in rows)
    assert torch.equal(attention_kernels.together(parts, rows), x)
