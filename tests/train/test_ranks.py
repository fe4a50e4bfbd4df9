"""Several ranks train as one does: gradients, losses, resuming on the same plan and on another."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, MistralConfig

from stretto.errors import ConfigError
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Context, Data
from stretto.testing.ranks import run_ranks
from stretto.train import checkpoint, shards
from stretto.train.job import Job, Rank, attention_bound, build
from stretto.train.presets import task_of
from tests.train.make import ADAMW, SGD, recipe, write_text

pytestmark = pytest.mark.ranks

CASES = {
    "fsdp2 sgd": (Data(shard=2), Context(), "gpt-tiny", SGD, 64),
    "ring2 adamw": (Data(), Context.named("ring", 2), "gpt-tiny", ADAMW, 67),
    "ulysses2 sgd": (Data(), Context.named("ulysses", 2), "dit-tiny", SGD, 64),
    "startrail4 sgd": (Data(), Context.named("startrail(2)", 4), "gpt-tiny", SGD, 67),
    "fsdp2 tile2 adamw": (Data(shard=2, micro_batch=2), Context(ring=2), "gpt-tiny", ADAMW, 67),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def silent(stage, **more):
    pass


def trained(mesh, job):
    """Losses and norms of a job, and this rank's shards of the first step's gradients."""
    task = task_of(job.recipe)
    model = task.model()
    with attention_bound(model, job.plan, mesh):
        first = build(task, model, job, mesh)
        first.backward(first.draw())
        gradients = [g.clone() for g in shards.gradients(model)]
    outcome = Rank(silent, job, mesh).run()
    steps = [(step.loss, step.norm) for step in outcome.steps]
    return steps, [v.loss for v in outcome.validations], gradients


def alone(job):
    one = Plan(kind="train")
    mesh = LocalWorld(one.sizes).mesh(0)
    return trained(mesh, Job(recipe=job.recipe, plan=one, validate=job.validate))


def run_job(mesh, job):
    outcome = Rank(silent, job, mesh).run()
    return [step.loss for step in outcome.steps], outcome.note


@pytest.mark.parametrize("name", CASES)
def test_ranks_give_the_gradients_and_losses_of_one(name, data):
    dp, cp, model, descent, tokens = CASES[name]
    source = data if model == "gpt-tiny" else None
    given = recipe(source, model=model, descent=descent, tokens=tokens)
    job = Job(recipe=given, plan=Plan(kind="train", dp=dp, cp=cp), validate=2)
    steps, validations, gradients = alone(job)
    found = run_ranks(trained, job.plan.sizes, job, timeout_s=110)
    for rank_steps, rank_validations, _ in found:
        assert rank_steps == [pytest.approx(step, rel=1e-12) for step in steps]
        assert rank_validations == pytest.approx(validations, rel=1e-12)
    for index, whole in enumerate(gradients):
        joined = torch.cat([rank[2][index] for rank in found])
        assert torch.allclose(joined, whole, rtol=1e-9, atol=1e-15)


WINDOWS = {
    "ring2": (Context.named("ring", 2), {}),
    "auto2": (Context(ring=2), {"documents": "joined"}),
    "ulysses2": (Context.named("ulysses", 2), {"tokens": 67, "recompute": True}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_on_ranks_are_those_of_torch_on_one(name, data):
    cp, changes = WINDOWS[name]
    given = recipe(data, window=9, **changes)
    job = Job(recipe=given, plan=Plan(kind="train", cp=cp))
    # Unbound on one rank, attention is torch's own under a mask.
    _, _, gradients = alone(job)
    bound, _ = run_job(LocalWorld(Plan(kind="train").sizes).mesh(0), job_of(given))
    found = run_ranks(trained, job.plan.sizes, job, timeout_s=110)
    for rank_steps, _, _ in found:
        assert [loss for loss, _ in rank_steps] == pytest.approx(bound, rel=1e-12)
    for index, whole in enumerate(gradients):
        joined = torch.cat([rank[2][index] for rank in found])
        assert torch.allclose(joined, whole, rtol=1e-9, atol=1e-15)


def first_step(mesh, job):
    """Loss and gradients of a job's first step, the loss summed over ranks."""
    task = task_of(job.recipe)
    model = task.model()
    with attention_bound(model, job.plan, mesh, alone=task.binds_alone):
        trainer = build(task, model, job, mesh)
        share = trainer.backward(trainer.draw())
        (loss,) = shards.total([share], mesh)
        return loss, [g.clone() for g in shards.gradients(model)]


def each_document_alone(job):
    """The same without stretto: a forward pass of transformers per document."""
    task = task_of(job.recipe)
    model, samples = task.model().double(), range(job.recipe.sequences)
    parts = [task.sample(number) for number in samples]
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        assert len(part.documents) > 1
        cuts = [x.split(part.documents, -1) for x in (part.tokens, part.labels)]
        for tokens, labels in zip(*cuts, strict=True):
            logits = model(input_ids=tokens, use_cache=False).logits[0]
            total = total + functional.cross_entropy(logits, labels[0], reduction="sum")
    loss = total / (job.recipe.sequences * job.recipe.tokens)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_documents_of_a_model_of_transformers_stay_apart(kind, data, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264}
    made = {"llama": LlamaConfig, "mistral": MistralConfig}[kind]
    window = {"sliding_window": 11} if kind == "mistral" else {}
    made(**shape, **window).save_pretrained(tmp_path)
    given = recipe(data, model=str(tmp_path), documents="apart", tokens=2000, sequences=2)
    loss, gradients = each_document_alone(job_of(given))
    one = first_step(LocalWorld(Plan(kind="train").sizes).mesh(0), job_of(given))
    plan = Plan(kind="train", cp=Context(ring=2))
    two = run_ranks(first_step, plan.sizes, Job(recipe=given, plan=plan), timeout_s=110)
    for found, _ in (one, *two):
        assert found == pytest.approx(loss, rel=1e-12)
    for index, whole in enumerate(gradients):
        joined = torch.cat([rank[1][index] for rank in two])
        for each in (one[1][index], joined):
            assert torch.allclose(each, whole, rtol=1e-9, atol=1e-15)


def held_out(mesh, given, samples):
    job = Job(recipe=given, plan=Plan(kind="train", dp=mesh.size("fsdp")))
    task = task_of(given)
    return build(task, task.model(), job, mesh).validate(samples).loss


def test_held_out_samples_are_as_many_on_any_number_of_ranks(data):
    given = recipe(data, sequences=6)
    alone = held_out(LocalWorld(Plan(kind="train").sizes).mesh(0), given, 4)
    assert held_out(LocalWorld(Plan(kind="train").sizes).mesh(0), given, 6) != alone
    for loss in run_ranks(held_out, {"fsdp": 3}, given, 4, timeout_s=110):
        assert loss == pytest.approx(alone, rel=1e-12)


def test_two_ranks_resume_bitwise(data, tmp_path):
    given = recipe(data, descent=ADAMW, steps=5)
    plan = Plan(kind="train", cp=Context.named("ring", 2))
    whole = run_ranks(run_job, plan.sizes, Job(recipe=given, plan=plan), timeout_s=110)
    cut = Job(recipe=given, plan=plan, out=str(tmp_path), save=3, until=4)
    run_ranks(run_job, plan.sizes, cut, timeout_s=110)
    again = Job(recipe=given, plan=plan, out=str(tmp_path), resume=True)
    found = run_ranks(run_job, plan.sizes, again, timeout_s=110)
    assert found[0][1].endswith("step-00000003")  # and no word of "not bitwise"
    assert [losses for losses, _ in found] == [losses[3:] for losses, _ in whole]


def test_a_checkpoint_of_four_ranks_goes_on_with_two(data, tmp_path):
    given = recipe(data, descent=ADAMW, steps=5)
    four = Plan(kind="train", dp=2, cp=Context(ring=2))
    two = Plan(kind="train", cp=Context.named("ulysses", 2))
    whole, _ = run_job(LocalWorld(Plan(kind="train").sizes).mesh(0), job_of(given))
    cut = Job(recipe=given, plan=four, out=str(tmp_path), save=3, until=4)
    run_ranks(run_job, four.sizes, cut, timeout_s=110)
    again = Job(recipe=given, plan=two, out=str(tmp_path), resume=True)
    losses, note = run_ranks(run_job, two.sizes, again, timeout_s=110)[0]
    assert losses == pytest.approx(whole[3:], rel=1e-12)
    assert "not bitwise: plan, ranks changed" in note


def save_into(mesh, folder):
    """What a rank is told where no folder can be made."""
    with pytest.raises(ConfigError) as error:
        checkpoint.save(Path(folder), 3, {"x": torch.ones(2)}, {}, mesh)
    return str(error.value)


def test_all_ranks_are_told_that_there_is_no_place_for_a_checkpoint(tmp_path):
    (tmp_path / "file").write_text("no folder")
    found = run_ranks(save_into, {"fsdp": 2}, str(tmp_path / "file/checkpoints"), timeout_s=60)
    assert found[0] == found[1]
    assert "cannot save step 3" in found[0]
    assert "Not a directory" in found[0]


def job_of(given):
    return Job(recipe=given, plan=Plan(kind="train"))


def bfloat16_weights(mesh, given):
    """Dtypes of what is stored and summed, and the loss, in a bfloat16 run."""
    job = Job(recipe=given, plan=Plan(kind="train", dp=mesh.size("fsdp")))
    task = task_of(given)
    trainer = build(task, task.model(), job, mesh)
    loss, _ = trainer.clip(trainer.backward(trainer.draw()))
    stored = {p.dtype for p in trainer.model.parameters()}
    return stored, {g.dtype for g in shards.gradients(trainer.model)}, loss


def test_bfloat16_computes_on_float32_masters(data):
    given = recipe(data, dtype="bfloat16")
    stored, summed, loss = run_ranks(bfloat16_weights, {"fsdp": 2}, given, timeout_s=110)[0]
    exact, _, _ = alone(job_of(recipe(data)))
    assert stored == summed == {torch.float32}
    assert loss == pytest.approx(exact[0][0], rel=1e-2)
    assert loss != pytest.approx(exact[0][0], rel=1e-7)
