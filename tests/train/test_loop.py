"""The loop on one rank: what a step depends on, schedules, checkpoints, resuming."""

import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stretto.errors import ConfigError, NonFinite, PlanMismatch
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Context, Data
from stretto.train import checkpoint, metrics, shards
from stretto.train.descent import rate_at
from stretto.train.events import Saved, Stepped, Validated
from stretto.train.job import Job, Outcome, build, check_cursor, resume_note, run
from stretto.train.loop import Intervals, train
from stretto.train.presets import task_of
from stretto.train.recipe import Descent, accumulation
from tests.train.make import ADAMW, recipe, trainer, write_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def mesh():
    return LocalWorld(Plan(kind="train").sizes).mesh(0)


def job(given, out=None, **more):
    return Job(recipe=given, plan=Plan(kind="train"), out=out and str(out), **more)


def silent(stage, **more):
    pass


def losses(outcome: Outcome):
    return [step.loss for step in outcome.steps]


@pytest.mark.parametrize("model", ["gpt-tiny", "dit-tiny"])
def test_micro_batches_change_only_the_order_of_sums(model, data, mesh):
    found = []
    for size in (1, 2, 4):
        given = recipe(data if model == "gpt-tiny" else None, model=model, tokens=64)
        plan = Plan(kind="train", dp=Data(micro_batch=size))
        subject = trainer(given, mesh, plan)
        share = subject.backward(subject.draw())
        found.append((share, [p.grad.clone() for p in subject.model.parameters()]))
    for share, gradients in found[1:]:
        assert torch.isclose(share, found[0][0], rtol=1e-13)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-15)


def test_the_loss_is_the_mean_over_all_tokens(data, mesh):
    subject = trainer(recipe(data), mesh)
    batch = subject.draw()
    assert batch.terms == 4 * 64
    with torch.no_grad():
        total = sum(subject.task.loss(subject.model, part) for part in batch.parts)
    assert subject.step().loss == pytest.approx(float(total) / (4 * 64), rel=1e-13)


def test_clipping_scales_all_gradients_by_one_factor(data, mesh):
    moved = []
    for clip in (0.0, 0.01):
        given = recipe(data, descent=Descent(optimizer="sgd", rate=1.0, warmup=0, clip=clip))
        subject = trainer(given, mesh)
        subject.backward(subject.draw())
        before = [g.clone() for g in shards.gradients(subject.model)]
        _, norm = subject.clip(torch.zeros(()))
        moved.append((norm, before, shards.gradients(subject.model)))
    (norm, whole, untouched), (again, _, clipped) = moved
    assert norm == again
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in whole)))
    assert all(map(torch.equal, whole, untouched))
    for one, other in zip(whole, clipped, strict=True):
        assert torch.allclose(one * (0.01 / norm), other, rtol=1e-12)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    descent = Descent(rate=1.0, warmup=4, final=0.1)
    rates = [rate_at(descent, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rate_at(descent, 500, 20) == pytest.approx(0.1)


def test_sequences_share_out_evenly_or_say_what_does():
    assert accumulation(8, 2, 2) == 2
    with pytest.raises(ConfigError, match="to fix: 9 sequences, or data ranks 1, 2, 4, 8"):
        accumulation(8, 3, 1)


def test_a_run_that_overflows_stops(data, mesh):
    given = recipe(data, descent=Descent(optimizer="sgd", rate=1e200, warmup=0, clip=0))
    with pytest.raises(NonFinite, match="gradient norm"):
        list(train(trainer(given, mesh), Intervals(), {}))


def test_events_come_in_order(data, mesh, tmp_path):
    subject = trainer(recipe(data), mesh)
    events = list(train(subject, Intervals(validate=2, save=3, folder=tmp_path), {}))
    names = [f"{type(event).__name__} {event.step}" for event in events]
    assert names == [
        *("Began 0", "Validated 0", "Stepped 1", "Stepped 2", "Validated 2", "Stepped 3"),
        *("Saved 3", "Stepped 4", "Validated 4", "Saved 4"),
    ]


def test_validation_moves_nothing(data, mesh):
    subject = trainer(recipe(data), mesh)
    before = [p.detach().clone() for p in subject.model.parameters()]
    assert subject.validate() == subject.validate()
    assert all(map(torch.equal, before, subject.model.parameters()))
    assert shards.gradients(subject.model) == []


# ---- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("descent", [ADAMW, recipe(None).descent], ids=["adamw", "sgd"])
def test_resuming_is_bitwise(descent, dtype, data, tmp_path):
    given = recipe(data, descent=descent, dtype=dtype, steps=6)
    whole = run(silent, job(given))
    run(silent, job(given, tmp_path, save=3, until=4))
    again = run(silent, job(given, tmp_path, resume=True))
    assert again.note.startswith("resumed after step 3")
    assert "not bitwise" not in again.note
    assert losses(again) == losses(whole)[3:]
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["loss"] for r in rows if r["event"] == "stepped"] == losses(whole)


def test_a_resumed_run_ends_with_the_random_state_of_an_uninterrupted_one(data, tmp_path):
    given = recipe(data, steps=2)
    states = []
    for folder, resume in (("whole", False), ("cut", True)):
        torch.manual_seed(7)
        if resume:
            run(silent, job(given, tmp_path / folder, save=1, until=2))
            torch.manual_seed(8)
        run(silent, job(given, tmp_path / folder, save=1, resume=resume))
        found = checkpoint.newest(tmp_path / folder / "checkpoints")
        state = {"random.0.cpu": torch.get_rng_state()}
        with checkpoint._quiet():
            dcp.load(state, checkpoint_id=found.path, no_dist=True)
        states.append(state["random.0.cpu"])
    assert torch.equal(*states)


def with_unused(given, mesh):
    """A trainer whose model has a matrix that no loss reaches, as some families have."""
    task = task_of(given)
    model = task.model()
    first = model.initial
    model.spare = torch.nn.Linear(3, 3, bias=False, device="meta")
    model.initial = lambda name, *more: first("norm.weight" if "spare" in name else name, *more)
    return build(task, model, job(given), mesh)


def test_a_parameter_that_nothing_used_does_not_stand_in_the_way(data, mesh, tmp_path):
    given = recipe(data, descent=ADAMW)
    subject = with_unused(given, mesh)
    subject.step()
    subject.save(tmp_path, {})
    wanted = subject.step().loss, subject.step().loss
    fresh = with_unused(given, mesh)
    fresh.restore(checkpoint.newest(tmp_path))
    assert (fresh.step().loss, fresh.step().loss) == wanted
    assert torch.equal(fresh.model.spare.weight, torch.ones(3, 3, dtype=torch.float64))


def test_a_checkpoint_of_another_optimizer_is_refused(data, mesh, tmp_path):
    for name, descent in (("sgd", recipe(None).descent), ("adamw", ADAMW)):
        subject = trainer(recipe(data, descent=descent), mesh)
        subject.step()
        subject.save(tmp_path / name, {})
    sgd = trainer(recipe(data), mesh)
    with pytest.raises(ConfigError, match="only in the checkpoint: optimizer"):
        sgd.restore(checkpoint.newest(tmp_path / "adamw"))
    adamw = trainer(recipe(data, descent=ADAMW), mesh)
    with pytest.raises(ConfigError, match="only in the model: optimizer"):
        adamw.restore(checkpoint.newest(tmp_path / "sgd"))


def test_random_state_is_part_of_a_checkpoint(data, mesh, tmp_path):
    subject = trainer(recipe(data), mesh)
    subject.step()
    saved = subject.save(tmp_path, {})
    drawn = torch.rand(3)
    fresh = trainer(recipe(data), mesh)
    fresh.restore(checkpoint.newest(tmp_path))
    assert torch.equal(torch.rand(3), drawn)
    assert saved.path == str(tmp_path / "step-00000001")


def test_half_written_checkpoints_are_ignored_with_a_warning(data, mesh, tmp_path, caplog):
    subject = trainer(recipe(data), mesh)
    subject.step()
    subject.save(tmp_path, {})
    (tmp_path / "step-00000009.tmp").mkdir()
    (tmp_path / "step-00000008").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 1
    assert "step-00000009.tmp is no complete checkpoint" in caplog.text
    assert "step-00000008 is no complete checkpoint" in caplog.text


def test_a_save_that_fails_leaves_the_previous_one(data, mesh, tmp_path, monkeypatch):
    subject = trainer(recipe(data), mesh)
    subject.step()
    subject.save(tmp_path, {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    subject.step()
    with pytest.raises(ConfigError, match=r"cannot save step 2.*No space left"):
        subject.save(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_newest_two_are_kept(data, mesh, tmp_path):
    subject = trainer(recipe(data), mesh)
    for _ in range(4):
        subject.step()
        subject.save(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_what_a_run_saves_is_not_removed_for_the_later_steps_of_another(data, mesh, tmp_path):
    subject = trainer(recipe(data), mesh)
    for done in (90, 100, 10):
        subject.done = done
        saved = subject.save(tmp_path, {})
        assert checkpoint.opened(Path(saved.path)).step == done
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_no_checkpoint_counts_for_none_that_is_kept(data, mesh, tmp_path):
    subject = trainer(recipe(data), mesh)
    for done in (1, 2, 4):
        (tmp_path / "step-00000003").mkdir(exist_ok=True)
        subject.done = done
        subject.save(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}" for step in (2, 3, 4)
    ]


def test_another_model_is_refused_with_its_keys(data, mesh, tmp_path):
    subject = trainer(recipe(data), mesh)
    subject.save(tmp_path, {})
    found = checkpoint.newest(tmp_path)
    tensors = checkpoint.tensors_of(subject.model, subject.optimizer)
    head = tensors.pop("model.head.weight")
    tensors |= {"model.other.weight": head, "model.norm.weight": torch.zeros(3)}
    with pytest.raises(ConfigError) as error:
        checkpoint.load(found, tensors, mesh)
    assert "only in the model: model.other.weight" in str(error.value)
    assert "only in the checkpoint: model.head.weight" in str(error.value)
    assert "model.norm.weight: (128,) there, (3,) here" in str(error.value)


def test_another_run_is_refused_and_another_schedule_is_named(data, tmp_path):
    given = recipe(data, steps=2)
    run(silent, job(given, tmp_path))
    with pytest.raises(ConfigError, match="tokens 64 there, 32 here"):
        run(silent, job(recipe(data, steps=2, tokens=32), tmp_path, resume=True))
    longer = run(silent, job(recipe(data, steps=3), tmp_path, resume=True))
    assert "not bitwise: recipe changed" in longer.note
    assert [step.step for step in longer.steps] == [3]


def test_a_plan_of_other_ranks_is_not_bitwise():
    state = {"plan": {"dp": 2}, "ranks": 2, "versions": {}, "recipe": {}, "data": "x"}
    found = checkpoint.Checkpoint("somewhere", 7, json.loads(json.dumps(state)))
    assert resume_note(found, state) == "resumed after step 7 of somewhere"
    assert "not bitwise: plan, ranks changed" in resume_note(
        found, state | {"plan": {}, "ranks": 4}
    )


def test_what_of_a_recipe_changed_is_named(data):
    now = {"plan": {}, "ranks": 1, "versions": {}, "data": "x", "recipe": recipe(data).as_dict()}
    was = json.loads(json.dumps(now))
    for added in ("window", "documents"):  # as an older release wrote it
        del was["recipe"][added]
    found = checkpoint.Checkpoint("somewhere", 7, was)
    assert "not bitwise" not in resume_note(found, now)
    was["recipe"]["descent"]["rate"] = 7.0
    now["recipe"]["window"] = 8
    note = resume_note(found, now)
    assert "recipe changed (window None there, 8 here, rate 7.0 there, 0.05 here)" in note


@pytest.mark.parametrize("text", ["{", "[]", '{"step": "x"}'])
def test_a_state_that_is_none_says_what_to_remove(text, tmp_path):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}: state.json"):
        checkpoint.opened(tmp_path)


@pytest.mark.parametrize("damage", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("content", [b"", b"garbage"], ids=["empty", "garbage"])
def test_a_damaged_checkpoint_says_what_to_remove(damage, content, data, tmp_path):
    run(silent, job(recipe(data, steps=1), tmp_path))
    folder = tmp_path / "checkpoints/step-00000001"
    (folder / damage).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"cannot read {folder}: .+[\s\S]*to fix: remove it"):
        run(silent, job(recipe(data, steps=2), tmp_path, resume=True))


def test_fewer_steps_than_are_done_are_refused(data, tmp_path):
    run(silent, job(recipe(data, steps=2), tmp_path))
    with pytest.raises(ConfigError, match=r"has done 2 steps[\s\S]*--steps 3 for 1 more"):
        run(silent, job(recipe(data, steps=1), tmp_path, resume=True))


@pytest.mark.parametrize("name", ["tpu", "meta", ""])
def test_a_device_that_nobody_trains_on_is_refused_before_ranks_start(name):
    with pytest.raises(ConfigError, match="ranks train on cpu or cuda"):
        Job(recipe=recipe(None), plan=Plan(kind="train"), device=name)


def test_a_device_that_is_not_here_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"device cuda:99: this process sees \d+ CUDA"):
        run(silent, job(recipe(data), tmp_path / "out", device="cuda:99"))
    assert not (tmp_path / "out").exists()


def test_resuming_what_is_not_there_begins_and_says_so(data, tmp_path, caplog):
    outcome = run(silent, job(recipe(data, steps=1), tmp_path, resume=True))
    assert [step.step for step in outcome.steps] == [1]
    assert f"no checkpoint in {tmp_path / 'checkpoints'} to resume" in caplog.text


def test_a_cursor_belongs_to_its_data():
    recipe_ = {"model": "m", "tokens": 1, "sequences": 1, "seed": 0, "data": None}
    found = checkpoint.Checkpoint("somewhere", 7, {"recipe": recipe_, "data": "abc"})
    check_cursor(found, {"recipe": recipe_, "data": "abc"})
    with pytest.raises(ConfigError, match="files 'abc' there, 'abd' here"):
        check_cursor(found, {"recipe": recipe_, "data": "abd"})


def test_a_new_run_among_checkpoints_of_another_is_refused(data, tmp_path):
    first = job(recipe(data, steps=2), tmp_path)
    run(silent, first)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds checkpoints[\s\S]*another folder"):
        run(silent, first)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("resume", [False, True])
def test_metrics_of_a_run_without_checkpoints_are_set_aside(data, tmp_path, resume):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
        run(silent, job(recipe(data, steps=1), tmp_path, resume=resume))
        shutil.rmtree(tmp_path / "checkpoints")
        assert metrics.read(tmp_path / f"metrics-{number}.jsonl") == [{"step": number}]
        assert metrics.read(tmp_path / "metrics.jsonl")[0]["event"] == "began"


def test_event_kinds_of_a_job(data, tmp_path):
    outcome = run(silent, job(recipe(data, steps=2), tmp_path, validate=1))
    assert [type(v) for v in (*outcome.steps, *outcome.validations)] == [
        *(Stepped,) * 2,
        *(Validated,) * 3,
    ]
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert rows[-1] == {"event": Saved.__name__.lower(), "step": 2} | {
        key: rows[-1][key] for key in ("path", "seconds")
    }
    assert outcome.tokens_per_second > 0
    assert outcome.mfu(1) > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"save": -1}, "save=-1: a number of steps, at least 0"),
        ({"validate": 0.5}, "validate=0.5"),
        ({"until": 0}, "until=0: a number of steps, at least 1"),
        ({"recipe": None}, "recipe=None is a NoneType, no Recipe"),
    ],
)
def test_a_job_without_sense_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Job(**({"recipe": recipe(None), "plan": Plan(kind="train")} | fields))


def test_a_job_of_no_plan_is_refused():
    with pytest.raises(PlanMismatch, match=r"is a Context, no Plan"):
        Job(recipe=recipe(None), plan=Context(ring=2))


@pytest.mark.parametrize("axes", [{"step": 2}, {"cfg": 2}, {"step": 2, "cfg": 2}])
def test_axes_of_a_generation_are_refused_before_ranks_start(axes):
    with pytest.raises(PlanMismatch, match=f"{', '.join(f'{a} 2' for a in axes)} of a training"):
        Job(recipe=recipe(None), plan=Plan(kind="train", cp=Context(ring=2), **axes))


@pytest.mark.parametrize("dp", [Data(replicate=2, shard=2), Data(replicate=4)])
def test_copies_of_the_weights_are_refused_before_ranks_start(dp):
    plan = Plan(kind="train", dp=dp, cp=Context(ring=2))
    with pytest.raises(PlanMismatch, match=r"over all 8 ranks[\s\S]*shard: 4\}"):
        Job(recipe=recipe(None), plan=plan)
    Job(recipe=recipe(None), plan=Plan(kind="train", dp=Data(shard=4), cp=Context(ring=2)))
