"""The slice benchmark: which rows it runs, and a dry run on real gloo ranks."""

import subprocess
import sys

import pytest
import steps_slices
from steps_slices import CFG, CFG_STEP, LEAST, PUBLISHED, SEQUENTIAL, TAIL

from tests.benchmarks.conftest import check_format


def asked(model, *more):
    options = steps_slices.parse(["--model", model, "--out", "x.json", *more])
    return steps_slices.chosen(options)[0], options


@pytest.mark.parametrize(
    ("name", "depth", "cfg_windows"),
    [("svd", 11, 17), ("cogvideox", 18, 17), ("audioldm2", 30, 54)],
)
def test_rows_on_eight_ranks_have_the_published_depths(name, depth, cfg_windows):
    model, options = asked(name)
    rows = {row.who: row for row in steps_slices.rows(model, options)}
    assert len(steps_slices.sizes_of(rows[PUBLISHED], model)) == depth
    assert rows[TAIL].plan.step.windows.depth == depth
    assert rows[CFG_STEP].plan.step.windows.depth == cfg_windows
    # Half calls at half cost: no deeper than published.
    assert cfg_windows / 2 <= depth
    assert {row.plan.world_size for row in rows.values()} == {8}
    assert (LEAST in rows) == (name == "audioldm2")


def test_an_exact_step_is_cut_over_all_ranks_that_would_idle():
    model, options = asked("audioldm2")
    rows = {row.who: row for row in steps_slices.rows(model, options)}
    # Three waveforms guided: six rows.
    sizes = {who: steps_slices.exact_batch(row.plan, 6) for who, row in rows.items()}
    assert sizes == {PUBLISHED: 6, CFG_STEP: 1, TAIL: 1, LEAST: 1, CFG: 3}


def test_odd_ranks_are_refused(capsys):
    with pytest.raises(SystemExit):
        asked("svd", "--ranks", "5")
    assert "--ranks 5" in capsys.readouterr().err


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["audioldm2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("svd", "cogvideox"))]
)
def test_dry_run(dry, name):
    words = ("--model", name, "--ranks", "4", "--repeats", "2", "--evaluations", "1")
    result, printed = dry("steps_slices.py", *words, "--commit", "abc")
    check_format(result)
    rows = {row["who"]: row for row in result["rows"]}
    assert {SEQUENTIAL, PUBLISHED, TAIL, CFG_STEP, CFG} <= rows.keys()
    assert result["finite"]
    assert result["commit"] == "abc"
    steps = result["shape"]["steps"]
    for who in (PUBLISHED, TAIL, CFG_STEP):
        row = rows[who]
        assert sum(row["windows"]) == steps
        assert len(row["ms"]) == 2
        # Every rank has its own counts; a rank evaluates exact steps and its window positions.
        assert len(row["evaluations"]) == len(row["bytes_per_rank"]) == 4
        assert max(row["evaluations"]) == row["depth_windows"]
        assert min(row["bytes_per_rank"]) > 0
        assert row["speedup"]["loop_vs_alone"] > 0
    assert rows[PUBLISHED]["depth_units"] == rows[PUBLISHED]["depth_windows"]
    assert set(result["denominators_s"]) == {"alone", "working", "evaluations"}
    assert "summary" in printed


class Alone:
    """The mesh of one rank, as far as a decision needs it."""

    def broadcast_bytes(self, data):
        return data


@pytest.mark.parametrize(("expected_s", "fits"), [(1.0, True), (1e6, False)])
def test_a_row_that_would_end_after_the_budget_does_not_start(expected_s, fits, capsys):
    bench = steps_slices.Bench.__new__(steps_slices.Bench)
    bench.options, bench.world, bench.rank = asked("svd")[1], Alone(), 0
    assert bench.may_run("a row", expected_s) is fits
    assert ("no time left for a row" in capsys.readouterr().out) is not fits


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_only_the_rows_asked_for(dry):
    words = ("--model", "audioldm2", "--ranks", "4", "--evaluations", "1", "--only", PUBLISHED)
    result, _ = dry("steps_slices.py", *words, "--repeats", "1")
    assert [row["who"] for row in result["rows"]] == [SEQUENTIAL, PUBLISHED]


@pytest.mark.ranks
def test_a_rank_that_fails_ends_the_job(tmp_path, capfd):
    words = ["--model", "svd", "--ranks", "4", "--dry", "--out", str(tmp_path / "x.json")]
    options = steps_slices.parse(words)
    log = tmp_path / "rank1.log"
    log.write_text("what rank 1 said")
    ranks = [
        (subprocess.Popen([sys.executable, "-c", code]), path)
        for code, path in (("import time; time.sleep(60)", tmp_path / "none"), ("exit(3)", log))
    ]
    try:
        assert steps_slices.wait(ranks, options.started + 60) == 1
    finally:
        ranks[0][0].kill()
        ranks[0][0].wait()
    assert "failed: ranks [1]" in capfd.readouterr().out
