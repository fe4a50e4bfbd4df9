"""`stretto plan train` and `stretto explain` of what it writes."""

import json

import pytest

from stretto.cli.app import main
from stretto.plan.io import read_plan
from stretto.workload.model import read_workload

JOB = ["gpt-small", "--cluster", "h100-x8", "--tokens", "32768"]


@pytest.fixture
def written(tmp_path, capsys):
    plan, job = tmp_path / "p.yaml", tmp_path / "w.yaml"
    code = main(["plan", "train", *JOB, "-o", str(plan), "--workload", str(job)])
    return code, plan, job, capsys.readouterr().out


def test_table_plan_and_workload(written):
    code, plan, job, printed = written
    assert code == 0
    best = read_plan(plan)
    assert best.kind == "train"
    assert best.world_size == 8
    assert best.origin.by == "find_plans"
    assert str(best.model_copy(update={"origin": None})) in printed
    assert "basis: projected from a published cluster" in printed
    assert "(ring)" in printed
    assert read_workload(job).tokens == 32768


def test_explain_with_ever_more_known(written, capsys):
    _, plan, job, _ = written
    assert main(["explain", str(plan)]) == 0
    assert "blocks of one rank's queries" in capsys.readouterr().out
    assert main(["explain", str(plan), "--workload", str(job)]) == 0
    assert "exact bytes of one attention" in capsys.readouterr().out
    assert main(["explain", str(plan), "--workload", str(job), "--cluster", "h100-x8"]) == 0
    printed = capsys.readouterr().out
    assert "would be faster:\n  nothing that was tried" in printed
    named = ["--model", "gpt-small", "--tokens", "32768", "--cluster", "h100-x8"]
    assert main(["explain", str(plan), *named]) == 0
    assert capsys.readouterr().out == printed


def test_explain_beside_another_plan(written, tmp_path, capsys):
    _, plan, job, _ = written
    ring = tmp_path / "ring.yaml"
    ring.write_text("stretto: plan/1\nkind: train\ncp: {ring: 8, schedule: {kind: ring}}\n")
    both = ["--workload", str(job), "--cluster", "h100-x8", "--diff", str(ring)]
    assert main(["explain", str(plan), *both]) == 0
    printed = capsys.readouterr().out
    assert "first:  train:" in printed
    assert "busiest interface" in printed


def test_json_holds_every_plan(capsys):
    assert main(["plan", "train", *JOB, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["basis"] == "projected"
    assert len(found["plans"]) > 20
    assert found["plans"][0]["seconds"] == min(plan["seconds"] for plan in found["plans"])
    assert found["best"]["kind"] == "train"


def test_explain_json_has_exact_bytes(written, capsys):
    _, plan, job, _ = written
    args = ["--workload", str(job), "--cluster", "h100-x8", "--json"]
    assert main(["explain", str(plan), *args]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    exact = found["one_attention"]
    assert sum(exact["bytes_per_rank"]) == sum(exact["link_bytes"].values())
    assert {line["pass"] for line in exact["phases"]} == {"forward", "backward"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gpt-9", "--cluster", "h100-x8"], "no model file and no preset 'gpt-9'"),
        (["gpt-small", "--cluster", "h900"], "no preset 'h900'"),
        (["gpt-small", "--cluster", "h100-x8", "--ranks", "9"], "9 devices of"),
        (["opt-30b", "--cluster", "rtx3090-x2"], "Infeasible: no plan for opt-30b"),
        ([*JOB, "-o", "/proc/x/p.yaml"], "cannot write"),
    ],
)
def test_what_cannot_be_planned(args, words, capsys):
    assert main(["plan", "train", *args]) == 2
    assert words in capsys.readouterr().err


def test_explain_refuses_a_workload_of_another_kind(written, tmp_path, capsys):
    from stretto.workload.model import Workload

    _, plan, job, _ = written
    other = tmp_path / "g.yaml"
    Workload.denoise(4, evaluation_seconds=1.0, guided_bytes=1).write(other)
    assert main(["explain", str(plan), "--workload", str(other)]) == 2
    assert "describes a generation" in capsys.readouterr().err
    assert main(["explain", str(plan), "--tokens", "8"]) == 2
    assert main(["explain", str(plan), "--steps", "8"]) == 2
    assert main(["explain", str(plan), "--model", "gpt-tiny", "--workload", str(job)]) == 2
