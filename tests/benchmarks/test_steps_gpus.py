"""Steps on several GPUs: which rows exist, what slices predict, and a dry run on gloo ranks."""

import json

import pytest
import step_bench
import steps_gpus
from step_bench import CFG, CFG_STEP, LEAST, PUBLISHED, SEQUENTIAL, TAIL

from tests.benchmarks.conftest import check_format
from tests.benchmarks.torchrun import dry_ranks


def asked(monkeypatch, ranks, *more):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    return steps_gpus.parse(["--out", "x.json", *more])


@pytest.mark.parametrize(
    ("ranks", "name", "absent"),
    [
        (2, "svd", {CFG_STEP}),
        (3, "svd", {CFG, CFG_STEP}),
        (4, "svd", set()),
        (8, "cogvideox", set()),
        (4, "flux", {CFG, CFG_STEP}),
    ],
)
def test_what_does_not_exist_is_skipped_by_name(monkeypatch, ranks, name, absent):
    options = asked(monkeypatch, ranks, "--models", name)
    skipped = steps_gpus.skipped(options)
    assert {each["who"] for each in skipped} == absent
    own = steps_gpus.of_model(options, name)
    model, _ = step_bench.chosen(own)
    rows = {row.who: row for row in step_bench.rows(model, own)}
    assert set(rows) == {PUBLISHED, TAIL, CFG, CFG_STEP} - absent
    sizes = {row.plan.world_size for row in rows.values()}
    assert sizes == {ranks}


def test_videos_have_the_published_frames(monkeypatch):
    options = asked(monkeypatch, 2)
    frames = {
        name: step_bench.chosen(steps_gpus.of_model(options, name))[1].frames
        for name in ("svd", "cogvideox")
    }
    assert frames == {"svd": 14, "cogvideox": 49}


def slices(folder, ranks, loop, ceiling):
    told = {
        "shape": {"steps": 50},
        "rows": [{"who": TAIL, "ceiling": ceiling}],
        "summary": {TAIL: {"loop_vs_alone": loop, "loop_vs_working": 1.2 * loop}},
    }
    (folder / f"steps-slices-svd-{ranks}-h100.json").write_text(json.dumps(told))


def test_as_many_slices_predict_what_they_showed(tmp_path):
    slices(tmp_path, 8, 4.0, 5.0)
    slices(tmp_path, 4, 3.0, 3.5)
    told = steps_gpus.prediction("svd", 4, TAIL, 3.4, tmp_path)
    assert told["how"] == "as many slices"
    assert told["loop"]["alone"] == 3.0
    steps_gpus.against(told, {"loop_vs_alone": 3.3, "loop_vs_working": 3.6})
    assert told["measured_over_predicted_percent"] == pytest.approx({"alone": 10, "working": 0})


def test_other_numbers_predict_by_the_share_of_the_ceiling(tmp_path):
    slices(tmp_path, 8, 4.0, 5.0)
    told = steps_gpus.prediction("svd", 2, TAIL, 1.9, tmp_path)
    assert told["slices"] == 8
    assert told["loop"]["alone"] == pytest.approx(0.8 * 1.9)


def test_nothing_measured_predicts_nothing(tmp_path):
    slices(tmp_path, 8, 4.0, 5.0)
    assert steps_gpus.prediction("flux", 8, TAIL, 4.0, tmp_path) is None
    assert steps_gpus.prediction("svd", 8, LEAST, 4.0, tmp_path) is None


def test_the_committed_files_predict():
    told = steps_gpus.prediction("svd", 8, PUBLISHED, 4.5)
    assert told["how"] == "as many slices"
    assert 3 < told["loop"]["alone"] < told["loop"]["working"] < 6


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dry_run(tmp_path):
    words = ("--models", "flux,audioldm2", "--evaluations", "1", "--repeats", "1")
    result, printed = dry_ranks("steps_gpus.py", tmp_path / "x.json", 2, *words)
    check_format(result)
    assert {(row["model"], row["who"]) for row in result["rows"]} == {
        ("flux", SEQUENTIAL),
        ("flux", PUBLISHED),
        ("flux", TAIL),
        *(("audioldm2", who) for who in (SEQUENTIAL, PUBLISHED, TAIL, LEAST, CFG)),
    }
    assert {each["model"] for each in result["skipped"]} == {"flux", "audioldm2"}
    assert "skipped: flux, cfg2 alone" in printed
    for row in result["rows"]:
        if row["who"] != SEQUENTIAL:
            assert min(row["bytes_per_rank"]) > 0
            assert len(row["exchange_s"]["all"]) == 5
            assert (row["prediction"] is None) == (row["model"] == "flux")
    own = json.loads((tmp_path / "x-flux.json").read_text())
    check_format(own)
    assert own["published_claim"] is None
    assert own["finite"]
