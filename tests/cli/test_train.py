"""`stretto train` as a user meets it: files, exit codes, one message, a lost rank, resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig

from stretto.cli import app as cli
from stretto.cli import train_curve
from stretto.cli.train_options import Down, Split, Work, plan_of, recipe_of
from stretto.plan.io import write_plan
from stretto.plan.model import Plan
from stretto.plan.options import Context, Data
from stretto.train import metrics
from stretto.train.compare import start
from stretto.train.job import Job
from tests.train.make import write_text

SMALL = ("--tokens", "64", "--sequences", "4", "--steps", "4", "--dtype", "float64")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def train(*arguments, out):
    return cli.main(["train", *arguments, "--out", str(out)])


def losses(out):
    rows = metrics.read(out / "metrics.jsonl")
    return [row["loss"] for row in rows if row["event"] == "stepped"]


# ---- what works ------------------------------------------------------------------------------


def test_a_run_leaves_metrics_checkpoint_curve_and_result(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*SMALL, "--data", data, "--validate-every", "2", "--json", out=out) == 0
    names = {file.name for file in out.iterdir()}
    assert {"metrics.jsonl", "checkpoints", "curve.html", "result.json"} <= names
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["stretto"] == "result/1"
    assert result["case"] == "train/gpt-tiny"
    assert result["summary"]["loss"] == losses(out)[-1]
    assert result["summary"]["tokens_per_second"] > 0
    page = (out / "curve.html").read_text()
    assert "held out" in page
    assert "<script src=" not in page  # it opens without a network


def test_a_resumed_run_continues_its_metrics(data, tmp_path, capsys):
    arguments = ("--tokens", "64", "--sequences", "2", "--steps", "6", "--data", data, "--quiet")
    assert train(*arguments, out=tmp_path / "whole") == 0
    out = tmp_path / "cut"
    assert train(*arguments, "--save-every", "3", out=out) == 0
    # As after a kill in step 5: the checkpoint of step 6 is not there, its metrics are.
    (out / "checkpoints/step-00000006").rename(out / "checkpoints/step-00000006.tmp")
    assert train(*arguments, "--resume", out=out) == 0
    assert losses(out) == losses(tmp_path / "whole")


def test_resuming_a_finished_run_changes_no_result(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*SMALL, "--data", data, "--quiet", out=out) == 0
    before = (out / "result.json").read_bytes(), losses(out)
    assert train(*SMALL, "--data", data, "--resume", out=out) == 0
    told = capsys.readouterr().out
    assert "no step was left to do" in told
    assert "nan" not in told
    assert ((out / "result.json").read_bytes(), losses(out)) == before


def test_a_configuration_of_transformers_trains(data, tmp_path, capsys):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264}
    LlamaConfig(**shape, **heads).save_pretrained(tmp_path / "llama")
    out = tmp_path / "out"
    assert train(str(tmp_path / "llama"), *SMALL, "--data", data, "--json", out=out) == 0
    assert json.loads(capsys.readouterr().out)["case"] == "train/llama"
    assert losses(out)[0] == pytest.approx(5.57, abs=0.1)  # log 264, as before any training


def test_a_plan_file_says_how_ranks_share(data, tmp_path, capsys):
    write_plan(Plan(kind="train", dp=Data(micro_batch=2)), tmp_path / "plan.yaml")
    plan = ("--plan", str(tmp_path / "plan.yaml"))
    assert train(*SMALL, "--data", data, *plan, "--json", out=tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out)["plan"].startswith("train: ")


def test_without_plotly_the_run_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    files, remarks = train_curve.draw(tmp_path, [], "title")
    assert files == []
    assert "pip install 'stretto[plots]'" in remarks[0]


def test_without_an_exporter_there_is_a_page_and_no_picture(tmp_path, monkeypatch):
    from plotly import graph_objects

    def refuse(*args, **kwargs):
        raise ValueError("no exporter here")

    monkeypatch.setattr(graph_objects.Figure, "write_image", refuse)
    rows = [{"event": "stepped", "step": 1, "loss": 2.0}]
    files, remarks = train_curve.draw(tmp_path, rows, "title")
    assert files == ["curve.html"]
    assert "pip install kaleido" in remarks[0]


@pytest.mark.ranks
def test_two_ranks_beside_one(data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--data", data, "--ranks", "2", "--cp", "auto", "--compare")
    assert train(*SMALL, *arguments, out=out) == 0
    assert "losses differ by" in capsys.readouterr().out.replace("\n", " ")
    result = json.loads((out / "result.json").read_text())
    assert [row["who"] for row in result["rows"][:2]] == ["1 rank", "2 ranks"]
    assert result["summary"]["loss_difference"] <= 1e-12
    assert result["summary"]["held_out_difference"] <= 1e-12
    assert result["summary"]["ceiling_ideal"] == 2


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("gpt-tinny",), "did you mean 'gpt-tiny'"),
        (("--compare",), "--compare on 1 rank"),
        (("--ranks", "2", "--compare", "--resume"), "give one"),
        (("--ranks", "4", "--fsdp", "3", "--cp", "ring"), "--fsdp 3 does not divide --ranks 4"),
        (("--ranks", "4", "--cp", "rung"), "no attention plan is named 'rung'"),
        (("--ranks", "6", "--cp", "startrail(2)"), "team^2"),
        (("--ranks", "3", "--plan", "absent.yaml"), "cannot read absent.yaml"),
        (("--plan", "absent.yaml", "--cp", "ring"), "already says --cp"),
        (("--data", "absent"), "no file or folder absent"),
        (("dit-tiny", "--tokens", "250"), "give 225 or 256"),
        (("--micro-batch", "3"), "9 sequences"),
        (("--rate", "-1"), "the rate is above 0"),
        (("--rate", "nan"), "all of them finite"),
        (("--weight-decay", "-1"), "weight decay -1"),
        (("--clip", "inf"), "clip inf"),
        (("--cp", "ring"), "--cp ring with no --ranks: one rank to a sequence"),
        (("--cp", "ring", "--ranks", "2", "--fsdp", "2"), "with --fsdp 2 and --ranks 2: one rank"),
        (("--cluster", "cpu-x2"), "--cluster cpu-x2 without --cp auto"),
        (("--cp", "auto", "--ranks", "2", "--cluster", "h900"), "no preset 'h900'"),
        (("--threads", "100000"), "--threads 100000: this machine has"),
        (("--device", "tpu"), "ranks train on cpu or cuda"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--seed", "-1"), "seed -1: from 0"),
        (("--seed", "0.5"), "'0.5' is no whole number"),
        (("--steps", "2.5"), "'2.5' is no whole number"),
        (("--ranks", "1000000"), "1000000 ranks: each takes 48 MiB"),
        (("--tokens", "1000000000000"), "or fewer, or more text"),
        (("--window", "0"), "--window"),
        (("--documents", "some"), "--documents"),
        (("dit-tiny", "--documents", "apart"), "--documents apart is of text"),
    ],
)
def test_bad_input_is_one_message_and_2(arguments, expected, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*arguments, out=out) == 2
    assert expected in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


def test_an_earlier_run_is_not_overwritten(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*SMALL, "--data", data, "--quiet", out=out) == 0
    before = (out / "metrics.jsonl").read_text()
    assert train(*SMALL, "--data", data, out=out) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before


def test_a_run_that_has_nothing_to_resume_says_so(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*SMALL, "--data", data, "--resume", out=out) == 0
    assert "to resume from: this run began at step 1" in capsys.readouterr().out
    assert train(*SMALL, "--data", data, "--resume", out=out) == 0
    assert "to resume from" not in capsys.readouterr().out


def test_a_vocabulary_smaller_than_bytes_is_refused(data, tmp_path, capsys):
    config = GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2)
    config.save_pretrained(tmp_path / "small")
    assert train(str(tmp_path / "small"), *SMALL, "--data", data, out=tmp_path / "out") == 2
    assert "vocabulary of 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        (GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2, n_positions=32), (), "64"),
        (BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), (), "behind them"),
        (GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2), ("--window", "8"), "sliding_"),
    ],
    ids=["short table", "looks ahead", "window"],
)
def test_a_model_that_cannot_learn_is_refused(config, arguments, expected, data, tmp_path, capsys):
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    argv = (str(tmp_path / "model"), *SMALL, "--data", data, *arguments)
    assert train(*argv, out=out) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


def test_weights_that_are_not_read_are_named(data, tmp_path, caplog):
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 264, "n_positions": 64}
    GPT2Config(**shape).save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    argv = (str(tmp_path / "model"), *SMALL, "--data", data, "--quiet")
    assert train(*argv, out=tmp_path / "out") == 0
    assert "model.safetensors is not read: weights are drawn from the seed" in caplog.text
    assert "stays off" in caplog.text  # GPT-2's dropout


def test_windows_and_joined_documents_from_the_command_line(data, tmp_path, capsys):
    argv = (*SMALL, "--data", data, "--window", "9", "--documents", "joined", "--json")
    assert train(*argv, out=tmp_path / "out") == 0
    asked = json.loads(capsys.readouterr().out)["recipe"]
    assert (asked["window"], asked["documents"]) == (9, "joined")


def test_a_plan_to_generate_is_refused(tmp_path, capsys):
    write_plan(Plan(cfg=2), tmp_path / "plan.yaml")
    assert train("--plan", str(tmp_path / "plan.yaml"), out=tmp_path / "out") == 2
    assert "kind: train" in capsys.readouterr().err


# ---- ranks that are lost ---------------------------------------------------------------------


def started(arguments, store):
    """A run in the background whose ranks have done two steps; the process and their pids."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stretto.cli.app", "train", *arguments],
        env={**os.environ, "TMPDIR": str(store)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        notes = [json.loads(file.read_text()) for file in sorted(store.glob("stretto-*/*.note"))]
        if len(notes) == 2 and all(note.get("done", 0) >= 3 for note in notes):
            return process, [note["pid"] for note in notes]
        os.sched_yield()
    raise AssertionError(f"no ranks: {process.communicate()}")


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "cp", ["ring", pytest.param(None, marks=pytest.mark.slow)], ids=["in attention", "in weights"]
)
def test_a_killed_rank_is_named_and_the_run_resumes_bitwise(cp, data, tmp_path):
    out, store = tmp_path / "out", tmp_path / "tmp"
    store.mkdir()
    arguments = ["--tokens", "64", "--sequences", "2", "--dtype", "float64", "--data", data]
    arguments += ["--ranks", "2", *(("--cp", cp) if cp else ())]
    cut = ["--steps", "400", "--save-every", "2", "--timeout", "20", "--out", str(out)]
    process, pids = started([*arguments, *cut], store)
    os.kill(pids[1], signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2, message
    assert message.startswith("RankLost")
    assert "rank 1" in message
    assert "last checkpoint: " in message
    assert str(out / "checkpoints" / "step-") in message
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}/fd/0")]
    saved = max(int(f.name[5:]) for f in (out / "checkpoints").glob("step-*[0-9]"))
    # Both stop at the same step of the same schedule.
    resumed = run_until(saved + 3, data, cp, out, resume=True)
    assert resumed == run_until(saved + 3, data, cp, tmp_path / "whole", resume=False)


def run_until(step, data, cp, out, *, resume):
    """Losses of a run on two ranks that stops after a step."""
    work = Work(data=data, tokens=64, sequences=2, steps=400)
    recipe = recipe_of("gpt-tiny", work, Down(), "float64")
    plan = plan_of(Split(ranks=2, cp=cp), recipe)
    start(Job(recipe=recipe, plan=plan, out=str(out), resume=resume, until=step, timeout_s=60))
    return losses(out)


def test_a_plan_of_the_options():
    recipe = recipe_of("gpt-tiny", Work(), Down(), "float32")
    assert recipe.tokens == 1024
    assert plan_of(Split(ranks=4), recipe) == Plan(kind="train", dp=4)
    shared = plan_of(Split(ranks=8, fsdp=2, cp="startrail(2)"), recipe)
    assert shared == Plan(kind="train", dp=2, cp=Context.named("startrail(2)", 4))
    assert plan_of(Split(cp="auto"), recipe) == Plan(kind="train")
    chosen = plan_of(Split(ranks=4, cp="auto"), recipe)
    assert chosen.world_size == 4
    assert chosen.origin.by == "find_plans"
