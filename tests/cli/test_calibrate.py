"""`stretto generate calibrate`: the table, the file, JSON, and what it refuses."""

import json

import pytest
from cyclopts import App, Parameter

from stretto.cli.app import main
from stretto.cli.calibrate import _spread, calibrate
from stretto.diffusion.calibration import read_calibration
from stretto.errors import ConfigError, UnsupportedPipeline
from stretto.testing import models

SMALL = ("unet", "--degree", "2", "--steps", "4", "--calls", "1", "--holdout", "1")


def run(*argv):
    app = App(default_parameter=Parameter(negative=()), result_action="return_value")
    app.command(calibrate)
    return app(["calibrate", *map(str, argv)], exit_on_error=False)


def test_table_and_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "new" / "plan.yaml"
    assert run(*SMALL, "--depth", 3, 4, "--classes", 5, 7, "--seed", 9, "--out", out) == 0
    known = read_calibration(out)
    assert known.depths == (3, 4)
    assert known.subject["pipeline"] == "ClassUNetPipeline"
    assert known.evidence.calls[0]["class_labels"] == [5]
    assert known.evidence.calls[0]["generator"] == {"seed": 9}
    assert known.evidence.holdout[0]["class_labels"] == [7]
    assert known.evidence.holdout[0]["generator"] == {"seed": 10}
    printed = capsys.readouterr().out
    assert "4 steps on 2 step ranks" in printed
    assert f"written: {out}" in printed
    for entry in known.frontier:
        assert f"{entry.verified_db:.1f}" in printed
        assert f"{entry.parastep_db:.1f}" in printed


def test_json_of_equal_results_is_null_and_the_document_is_the_file(tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    flags = ("--depth", 4, "--guidance-scale", 1, "--json", "--out", out)
    assert run(*SMALL, *flags) == 0
    document = json.loads(capsys.readouterr().out)
    known = read_calibration(out)
    assert document["file"] == str(out)
    assert document["frontier"][0]["windows"] == "1 1 1 1"
    assert document["frontier"][0]["verified_db"] is None
    assert known.frontier[0].verified_db == float("inf")
    assert document["evidence"]["guidance"] is False


def test_it_is_a_command_of_generate_and_errors_are_exit_2(tmp_path, capsys):
    flags = (*SMALL, "--depth", "2", "--out", str(tmp_path / "plan.yaml"))
    assert main(["generate", "calibrate", *flags]) == 2
    printed = capsys.readouterr().err
    assert "PlanMismatch: depth [2]: 4 steps on 2 step ranks" in printed
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(ConfigError, match="cannot write"):
        run("/nowhere-such-pipeline", "--out", tmp_path)


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        run(tmp_path / "missing", "--out", tmp_path / "plan.yaml")


def test_what_to_show_must_fit_the_pipeline(tmp_path, monkeypatch):
    out = ("--out", tmp_path / "plan.yaml")
    with pytest.raises(UnsupportedPipeline, match="ClassUNetPipeline cannot be called with --prom"):
        run(*SMALL, "--prompt", "a harbour", *out)
    text = models.CASES["sd15-ddim"].pipeline()
    monkeypatch.setattr("stretto.cli.calibrate.open_pipeline", lambda folder: text)
    with pytest.raises(ConfigError, match="takes text: pass --prompt"):
        run("sd", *SMALL[1:], *out)
    with pytest.raises(UnsupportedPipeline, match="cannot be called with --classes"):
        run("sd", *SMALL[1:], "--classes", 1, *out)


def test_what_the_pipeline_cannot_take_is_named(tmp_path, monkeypatch):
    """A pipeline saved without its tokenizer fails from deep inside."""
    text = models.CASES["sd15-ddim"].pipeline()
    monkeypatch.setattr("stretto.cli.calibrate.open_pipeline", lambda folder: text)
    with pytest.raises(ConfigError, match=r"it was given: prompt='a harbour'"):
        run("sd", *SMALL[1:], "--prompt", "a harbour", "--out", tmp_path / "plan.yaml")


@pytest.mark.parametrize("flags", [("--seed", "9" * 24), ("--guidance-scale", "nan")])
def test_numbers_that_are_none_are_refused(flags, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    assert main(["generate", "calibrate", *SMALL, *flags, "--out", str(out)]) == 2
    assert "Invalid value" in capsys.readouterr().err
    assert not out.exists()


def test_default_classes_cover_the_model():
    assert _spread(10, 4, 4) == [0, 2, 5, 7, 1, 3, 6, 8]
    assert _spread(1000, 2, 1) == [0, 500, 500]
    assert _spread(1, 2, 2) == [0, 0, 0, 0]
