"""`stretto explain`: with a plan alone, with a cluster, with a second plan; never torch."""

import json

import pytest

from stretto.cli import app
from stretto.plan.io import read_plan
from stretto.plan.options import StepsCase
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
    assert "windows for 20 steps: 1 2 4" in out
    found = json.loads(run(capsys, *argv, "--json")[1])["plans"][0]
    sizes = tuple(found["windows"])
    declared = [read_plan(files[0]).step.wire(StepsCase(sizes, r, 1000)).total() for r in range(4)]
    assert found["bytes_per_step_rank"] == declared
    assert f"step rank 3 sends {declared[3]} bytes" in out


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
    ],
)
def test_bad_input_is_2_and_says_what(files, capsys, argv, match):
    names = {"p": files[0], "w": files[2]}
    code, out, err = run(capsys, *(word.format(**names) for word in argv))
    assert code == 2
    assert match in out + err


def test_explaining_imports_no_torch(files):
    argv = ["explain", files[0], "--workload", files[2], "--cluster", "h100-x8"]
    loaded = modules_after(f"from stretto.cli.app import main\nassert main({argv!r}) == 0")
    assert "stretto.cost.estimate" in loaded
    assert not loaded & {"torch", "numpy", "diffusers"}
