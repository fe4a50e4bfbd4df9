"""`stretto generate` as a user meets it: files, exit codes, one message, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stretto.cli import app as cli
from stretto.cli import generate as generating
from stretto.cli.generate_options import Subject, call_of, threads_of
from stretto.cluster import detect
from stretto.diffusion.shipped.pipeline import ClassDiTPipeline
from stretto.diffusion.steps import StepRun
from stretto.diffusion.worker import _read
from stretto.errors import PlanMismatch
from stretto.plan.io import write_plan
from stretto.plan.model import Plan

BRIEF = ("--steps", "2")
SMALL = ("--steps", "4", "--classes", "1,7")


def generate(*arguments, out):
    return cli.main(["generate", *arguments, "--out", str(out)])


def refused(capsys, *arguments, out):
    """The message of a command line that must end with 2 and leave no folder."""
    assert generate(*arguments, out=out) == 2
    assert not out.exists()
    printed, message = capsys.readouterr()
    assert printed == ""
    return message


# ---- what works ------------------------------------------------------------------------------


def test_virtual_ranks_write_pictures_and_a_result(tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(*SMALL, "--step", "2", "--emulate", "--json", out=out) == 0
    names = ["000.png", "001.png", "grid.png", "result.json"]
    assert sorted(f.name for f in out.iterdir()) == names
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["stretto"] == "result/1"
    assert result["basis"] == "measured"
    assert result["emulated"]
    (row,) = result["rows"]
    assert row["windows"] == [1, 1, 2]
    assert row["evaluations"] == [3, 3]
    assert row["seconds"] == []


def test_without_a_folder_the_shipped_model_is_taken_whatever_lies_around(tmp_path, monkeypatch):
    (tmp_path / "dit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert generate("--steps", "1", "--classes", "1", "--quiet", out=tmp_path / "out") == 0


def test_a_number_of_steps_that_a_pipeline_does_not_take_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ClassDiTPipeline, "__call__", _takes_few_steps)
    message = refused(capsys, "--steps", "9", "--classes", "1", out=tmp_path / "out")
    assert "num_inference_steps=9" in message


def _takes_few_steps(self, class_labels, num_inference_steps=4, guidance_scale=2.0):
    raise ValueError("at most 4 steps")


def test_a_plan_file_says_how_many_ranks(tmp_path, capsys):
    write_plan(Plan(cfg=2), tmp_path / "plan.yaml")
    arguments = ("--plan", str(tmp_path / "plan.yaml"), "--emulate", "--json")
    assert generate(*SMALL, *arguments, out=tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "generate: cfg2 = 2 ranks"


def test_arguments_of_the_pipeline(tmp_path, capsys):
    arguments = ("--set", "guidance_scale=1.0", "--set", "class_labels=[2]", "--steps", "2")
    assert generate(*arguments, "--json", out=tmp_path / "out") == 0
    call = json.loads(capsys.readouterr().out)["call"]
    assert (call["guidance_scale"], call["class_labels"]) == (1.0, [2])


@pytest.mark.ranks
def test_two_ranks_compare(tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(*SMALL, "--ranks", "2", "--compare", out=out) == 0
    printed = capsys.readouterr().out
    for name in ("sequential", "ours", "published parastep", "step alone", "fewer steps"):
        assert name in printed
    assert "noise floor" in printed
    assert {"compare.png", "grid.png", "result.json"} <= {f.name for f in out.iterdir()}
    result = json.loads((out / "result.json").read_text())
    assert [len(row["seconds"]) for row in result["rows"]] == [3] * 5
    summary = result["summary"]
    assert summary["noise_floor_identical"] or summary["noise_floor_db"] > 100


def test_virtual_ranks_compare_without_times(tmp_path, capsys):
    words = (*SMALL, "--ranks", "2", "--compare", "--emulate")
    assert generate(*words, out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "ours" in printed
    assert "published parastep" in printed
    assert "emulated: ranks took turns in one process, so there are no times" in printed


def test_calibrate_is_a_command_of_its_own(capsys):
    assert cli.main(["generate", "calibrate", "--help"]) == 0
    assert "--holdout" in capsys.readouterr().out


def test_files_of_an_earlier_run_are_named(tmp_path, capsys):
    assert generate("--classes", "1,7", *BRIEF, out=tmp_path) == 0
    assert "also holds" not in capsys.readouterr().out
    assert generate("--classes", "1", *BRIEF, out=tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "also holds 001.png, grid.png, not of this run" in printed


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--ranks", "4", "--step", "2"), "step 2 x cfg 1 = 2 ranks, but --ranks is 4"),
        (("--step", "2", "--windows", "tial"), "did you mean 'tail'"),
        (("--step", "2", "--predictor", "dampd"), "did you mean 'damped'"),
        (("--step", "2", "--windows", "fixed", "--depth", "9"), "--depth 9 with --windows fixed"),
        (("--windows", "tail"), "--windows without --step"),
        (("--compare",), "--compare on 1 rank"),
        (("--repeats", "5"), "--repeats 5 without --compare"),
        (("--steps", "2.5"), "'2.5' is no whole number"),
        (("--steps", "many"), "'many' is no whole number"),
        (("--seed", "inf"), "'inf' is no whole number"),
        (("--ranks", "1000000"), "1000000 ranks: each takes 48 MiB"),
        (("--threads", "100000"), "--threads 100000: this machine has"),
        (("--classes", "one"), "--classes 'one'"),
        (("--set", "height"), "name=value"),
        (("--set", "class_labels=[1]", "--classes", "3"), "--classes and --set class_labels"),
        (("--set", "class_labels=cat", *BRIEF), "ClassDiTPipeline cannot be called so: TypeError"),
        (("--set", "latents=[1, 2]", *BRIEF), "it was given: latents=[1, 2]"),
        (("--guidance-scale", "nan", *BRIEF), "nan is no finite number"),
        (("--seed", "9" * 24, *BRIEF), 'Invalid value "9999'),
        (("--device", "meta", *BRIEF), "device meta: ranks work on cpu or cuda"),
        (("--device", "cpu:3", *BRIEF), "device cpu:3: the processor is one device"),
        (("--set", "guidance_scale=NaN", *BRIEF), "--set ...NaN: no finite number"),
        (("--set", "sigmas=[1, 1e999]", *BRIEF), "--set ...1e999: no finite number"),
        (("--set", "guidance_scale=2", "--set", "guidance_scale=3"), "guidance_scale=... is given"),
        (("--set", "output_type=pil"), "stretto sets it"),
        (("--plan", "absent.yaml"), "cannot read absent.yaml"),
        (("--plan", "absent.yaml", "--cfg", "2"), "already says --cfg"),
        (("absent-folder",), "no folder absent-folder"),
        (("",), "no folder ''"),
        (("x" * 300,), "no folder xxx"),
        (("--step", "2", "--windows", "x" * 300), "no schedule and no file"),
        (("--set", "latents=@" + "x" * 300, *BRIEF), "no file xxx"),
        (("shipped:dti",), "did you mean 'dit'"),
        (("--dtype", "float8"), "--dtype 'float8'"),
        (("--step", "8", "--steps", "4", "--emulate"), "step=8 is larger than the 4 steps"),
        (("--classes", "3,10", "--steps", "2"), "ConfigError: class labels [10] are outside 0..9"),
    ],
)
def test_bad_input_is_one_message_and_2(arguments, expected, tmp_path, capsys):
    assert expected in refused(capsys, *arguments, out=tmp_path / "out").replace("\n", " ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("stretto: [", "is not YAML"),
        ("stretto: plan/1", "needed is `stretto: calibration/1`"),
        (None, "step=9 is larger than the 4 steps"),
    ],
)
def test_what_files_and_numbers_alone_show_is_refused_before_ranks_start(
    content, expected, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(generating, "prepare", lambda *arguments, **options: None)
    monkeypatch.setattr(generating, "launch", None)
    arguments = ["--step", "9"]
    if content is not None:
        (tmp_path / "my.yaml").write_text(content)
        arguments = ["--step", "2", "--windows", str(tmp_path / "my.yaml")]
    assert expected in refused(capsys, *SMALL, *arguments, out=tmp_path / "out")


def test_an_empty_folder_name_is_not_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(*SMALL, out="") == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_name_that_is_too_long_is_refused(tmp_path, capsys):
    assert generate(*SMALL, out=tmp_path / ("x" * 300)) == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_prompt_is_text_whatever_it_starts_with():
    call = call_of(Subject(prompt="@home", arguments=("negative_prompt=@@work", "other=plain")))
    read = {name: _read(value) for name, value in call.items()}
    assert read == {"prompt": "@home", "negative_prompt": "@work", "other": "plain"}


def test_numbers_of_arguments_are_those_of_json():
    call = call_of(Subject(arguments=("a=2.5", "b=[1, 1e3]", 'c="NaN"', "d=1.5.0")))
    assert call == {"a": 2.5, "b": [1, 1000.0], "c": "NaN", "d": "1.5.0"}


def test_a_plan_to_train_is_refused(tmp_path, capsys):
    write_plan(Plan(kind="train", dp=64), tmp_path / "plan.yaml")
    message = refused(capsys, "--plan", str(tmp_path / "plan.yaml"), out=tmp_path / "out")
    assert "plan to train; needed is kind: generate" in message.replace("\n", " ")


@pytest.mark.parametrize("axis", [{"cp": 2}, {"dp": 2}], ids=str)
def test_axes_that_no_generation_shares_are_refused(tmp_path, capsys, axis):
    """Two ranks would generate the same picture, and be counted as a plan of twice the ranks."""
    write_plan(Plan(step=2, **axis), tmp_path / "plan.yaml")
    message = refused(capsys, "--plan", str(tmp_path / "plan.yaml"), out=tmp_path / "out")
    assert "has {}={}, and a generation".format(*next(iter(axis.items()))) in message


@pytest.mark.parametrize(
    ("asked", "ranks", "load", "threads"),
    [(None, 2, 0.0, 1), (None, 1, 0.2, 4), (None, 1, 1.8, 2), (None, 1, 9.0, 1), (3, 2, 9.0, 3)],
)
def test_a_single_rank_takes_the_free_cores(asked, ranks, load, threads, monkeypatch):
    monkeypatch.setattr(detect, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert threads_of(asked, ranks) == threads


def test_output_that_cannot_be_written_is_known_before_anything_runs(tmp_path, capsys):
    (tmp_path / "taken").write_text("kept")
    assert generate("--ranks", "2", out=tmp_path / "taken" / "out") == 2
    assert "cannot write into" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "kept"


def test_a_predictor_beside_the_published_schedule_is_refused(tmp_path, capsys):
    """It would be ignored: that schedule brings its own."""
    options = ("--step", "2", "--windows", "parastep", "--predictor")
    message = refused(capsys, *SMALL, *options, "taylor-1", "--emulate", out=tmp_path / "out")
    assert message.startswith("PlanMismatch: --predictor taylor-1 with --windows parastep")
    assert generate(*SMALL, *options, "own", "--emulate", out=tmp_path / "out") == 0


def test_a_depth_that_no_windows_reach_is_refused(tmp_path, capsys):
    message = refused(
        capsys, *SMALL, "--step", "2", "--depth", "2", "--emulate", out=tmp_path / "out"
    )
    assert message.startswith(PlanMismatch.__name__)


@pytest.mark.ranks
def test_an_error_on_the_ranks_keeps_its_type_and_leaves_nothing(tmp_path, capsys):
    message = refused(capsys, "--ranks", "2", "--classes", "3,10", out=tmp_path / "out")
    assert message.startswith("ConfigError")
    assert "outside 0..9" in message


def test_a_mistake_of_ours_is_not_blamed_on_the_arguments(tmp_path, monkeypatch):
    def broken(self, *arguments, **options):
        raise ValueError("mislaid")

    monkeypatch.setattr(StepRun, "denoise", broken)
    monkeypatch.setitem(broken.__globals__, "__name__", "stretto.diffusion.steps")
    with pytest.raises(ValueError, match="mislaid"):
        generate(*BRIEF, "--classes", "1", out=tmp_path / "out")


# ---- ranks that are lost ---------------------------------------------------------------------


def children(of):
    """Processes below one, from /proc: pid -> parent pid."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    below, found = {of}, set()
    while below:
        below = {pid for pid, parent in parents.items() if parent in below}
        found |= below
    return found


def ranks_of(process, store):
    """Pids of the ranks, from the notes that they leave for their parent."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        notes = [json.loads(file.read_text()) for file in store.glob("stretto-*/*.note")]
        if len(notes) == 2 and all(note.get("done", 0) > 1 for note in notes):
            return [note["pid"] for note in notes]
        os.sched_yield()
    raise AssertionError(f"no ranks: {process.communicate()}")


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_job_with_2_and_no_file(how, tmp_path):
    out, store = tmp_path / "out", tmp_path / "tmp"
    store.mkdir()
    command = [sys.executable, "-m", "stretto.cli.app", "generate", "--ranks", "2", "--step", "2"]
    command += ["--steps", "200", "--timeout", "4", "--out", str(out)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(store)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = ranks_of(process, store)
    below = children(process.pid)
    os.kill(ranks[1], how)
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 2, message
    assert message.startswith("RankLost")
    assert "rank 1" in message
    assert printed == ""
    assert not out.exists()
    assert not [pid for pid in below & set(ranks) if os.path.exists(f"/proc/{pid}/fd/0")]
