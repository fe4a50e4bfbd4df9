"""`stretto explain`: with a plan alone, with a cluster, with a second plan; never torch."""

import json

import pytest

from stretto.cli import app
from stretto.plan.io import read_plan, write_plan
from stretto.plan.model import Plan
from stretto.plan.options import Context, StepsCase
from stretto.workload.model import Workload
from tests.fresh import modules_after


@pytest.fixture
def files(tmp_path):
    """A plan of 8 ranks, another, and a workload, as files."""
    plan, other, workload = (str(tmp_path / f"{name}.yaml") for name in "pqw")
    with open(plan, "w") as file:
        file.write("stretto: plan/1\nkind: generate\nstep: {degree: 4}\ncfg: {degree: 2}\n")
    with open(other, "w") as file:
        file.write("stretto: plan/1\nkind: generate\nstep: {degree: 8}\n")
    Workload.denoise(50, evaluation_seconds=1.0, guided_bytes="1 MB").write(workload)
    return plan, other, workload


def run(capsys, *argv):
    code = app.main(["explain", *argv])
    return code, *capsys.readouterr()


def test_a_plan_alone(files, capsys):
    code, out, _ = run(capsys, files[0])
    assert code == 0
    assert "= 8 ranks" in out
    assert "step   4 rank(s)" in out


def test_windows_and_bytes_without_a_cluster(files, capsys):
    argv = [files[0], "--steps", "20", "--shift", "3", "--guided-bytes", "1 kB"]
    _, out, _ = run(capsys, *argv)
    assert "windows for 20 steps: 1 2 3" in out
    found = json.loads(run(capsys, *argv, "--json")[1])["plans"][0]
    sizes = tuple(found["windows"])
    declared = [read_plan(files[0]).step.wire(StepsCase(sizes, r, 1000)).total() for r in range(4)]
    assert found["bytes_per_step_rank"] == declared
    assert f"step rank 3 sends {declared[3]} bytes" in out


def test_a_shift_of_no_steps_is_refused(files, capsys):
    code, out, err = run(capsys, files[0], "--shift", "3")
    assert (code, out) == (2, "")
    assert "--shift 3 without --steps" in err


def test_times_on_a_preset(files, capsys):
    argv = [files[0], "--workload", files[2], "--cluster", "h100-x8"]
    _, out, _ = run(capsys, *argv)
    assert "<- limits" in out
    found = json.loads(run(capsys, *argv, "--json")[1])["plans"][0]
    assert found["basis"] == "projected"
    assert found["seconds"] == pytest.approx(8.5, abs=0.1)
    assert found["interval"][0] < found["seconds"] < found["interval"][1]


def test_two_plans_side_by_side(files, capsys):
    argv = [files[0], "--diff", files[1], "--workload", files[2], "--cluster", "h100-x8"]
    _, out, _ = run(capsys, *argv)
    assert "second: generate: step8" in out
    assert len(json.loads(run(capsys, *argv, "--json")[1])["plans"]) == 2


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["missing.yaml"], "cannot read missing.yaml"),
        (["{p}", "--workload", "{w}"], "times need both"),
        (["{p}", "--cluster", "h100-x8"], "times need both"),
        (["{p}", "--workload", "{w}", "--cluster", "h900"], "no preset 'h900'"),
        (["{p}", "--workload", "{w}", "--cluster", "rtx3090-x2"], "for 2 device"),
        (["{p}", "--workload", "{p}", "--cluster", "h100-x8"], "needed is `stretto: workload/1`"),
        (["{p}", "--guided-bytes", "1 MB"], "needs --steps too"),
        (["{p}", "--steps", "9", "--guided-bytes", "huge"], "--guided-bytes: 'huge'"),
        (["{p}", "--steps", "9", "--workload", "{w}", "--cluster", "h100-x8"], "one or other"),
        (["{p}", "--steps", "2"], "step=4 for 2 denoising steps"),
        (["{p}", "--steps", "0"], "--steps"),
        (["{p}", "--ranks", "4"], "--ranks is of a plan that is named"),
        (["{p}", "--model", "gpt-tiny"], "one of a generation"),
        (["{p}", "--window", "4"], "--window without --model"),
        (["ring"], "no file, and as a name it lacks a number of ranks"),
        (["rung", "--ranks", "4"], "no attention plan is named 'rung'"),
        (["startrail(2)", "--ranks", "6"], "team^2"),
        (["ring", "--cluster", "h100-x8"], "nothing to train on it"),
        (["ring", "--cluster", "h900"], "no preset 'h900'"),
        (["ring", "--ranks", "8", "--diff", "{p}"], "ring to train and {p} to generate"),
    ],
)
def test_bad_input_is_2_and_says_what(files, capsys, argv, match):
    names = {"p": files[0], "w": files[2]}
    code, out, err = run(capsys, *(word.format(**names) for word in argv))
    assert code == 2
    assert match.format(**names) in out + err


SMALL = ("--model", "gpt-tiny", "--tokens", "4096")


def test_a_named_plan_has_the_bytes_that_its_file_has(tmp_path, capsys):
    file = tmp_path / "plan.yaml"
    write_plan(Plan(kind="train", cp=Context.named("startrail(2)", 8)), file)
    assert run(capsys, "startrail(2)", "--ranks", "8") == run(capsys, str(file))
    _, by_name, _ = run(capsys, "startrail(2)", *SMALL, "--cluster", "h100-x8")
    assert by_name == run(capsys, str(file), *SMALL, "--cluster", "h100-x8")[1]
    for word in ("column", "bytes per rank", "in node", "hops", "peak memory", "a step"):
        assert word in by_name
    both = run(capsys, "startrail(2)", "--ranks", "8", "--diff", "ring", *SMALL)[1]
    assert both.count("whole step, 4 attentions") == 2


def test_dtype_and_window_are_those_of_the_job(capsys):
    argv = ["ring", *SMALL, "--cluster", "h100-x8", "--json"]
    plain = json.loads(run(capsys, *argv)[1])["plans"][0]
    double = json.loads(run(capsys, *argv, "--dtype", "fp64")[1])["plans"][0]
    near = json.loads(run(capsys, *argv, "--window", "64")[1])["plans"][0]
    column = [each["one_attention"]["phases"][0]["most"] for each in (plain, double)]
    assert column[1] == 4 * column[0]
    assert near["phases"]["attention forward"] <= plain["phases"]["attention forward"]
    assert "fp64" in run(capsys, *argv[:-1], "--dtype", "fp64")[1]


def test_bytes_without_a_cluster_as_json(capsys):
    argv = ["ring", "--ranks", "4", *SMALL]
    found = json.loads(run(capsys, *argv, "--json")[1])["plans"][0]["one_attention"]
    assert f": {4 * max(found['bytes_per_rank'])} bytes per rank" in run(capsys, *argv)[1]
    assert found["link_bytes"] is None


def test_explaining_imports_no_torch(files):
    argv = ["explain", files[0], "--workload", files[2], "--cluster", "h100-x8"]
    loaded = modules_after(f"from stretto.cli.app import main\nassert main({argv!r}) == 0")
    assert "stretto.cost.estimate" in loaded
    assert not loaded & {"torch", "numpy", "diffusers"}
