"""Models of transformers under a plan: equal to one rank, or refused with the reason."""

import copy

import pytest
import torch

from stretto.errors import PlanMismatch, ShapeError, UnsupportedModel
from stretto.mesh.local import LocalWorld
from stretto.parallel.api import parallelize
from stretto.parallel.batch import shard
from stretto.parallel.layouts.causal_lm import SEAT
from stretto.plan.context import Context
from stretto.testing import families, support
from stretto.testing.ranks import run_ranks

RING = Context(ring=2)


def on_threads(body, plan=RING):
    return LocalWorld(plan.sizes).run(body)


def verdict(family, plan=RING, **options):
    found = on_threads(lambda mesh: support.examine(family, mesh, plan, **options), plan)
    assert len({(each.verdict, each.reason) for each in found}) == 1
    return found[0]


def ids(batch=2, tokens=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 100, (batch, tokens), generator=generator)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("llama", id="grouped queries"),
        pytest.param("mistral", id="window"),
        pytest.param("gemma3_text", id="window and full"),
        pytest.param("llama4_text", id="chunks, temperature, experts"),
        pytest.param("deepseek_v3", id="keys wider than values"),
        pytest.param("roberta", id="positions from pad + 1"),
        pytest.param("gpt2", id="learned positions"),
        pytest.param("gpt_oss", id="sinks"),
        pytest.param("bart", id="positions told to a table"),
    ],
)
def test_family_equals_one_rank(family):
    found = verdict(family)
    assert found.verdict == "equal", found


@pytest.mark.parametrize(
    "plan",
    [Context(), Context(ulysses=2), Context(team=2), Context(ring=3), Context(ring=2, ulysses=2)],
    ids=Context.short,
)
def test_plans_agree(plan):
    assert verdict("qwen3", plan).verdict == "equal"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("lfm2", "model.layers.0.conv.out_proj (Linear) mixes tokens outside the attention"),
        ("qwen3_next", "linear_attn"),
        ("gemma2", "Gemma2Attention passes softcap"),
        ("inkling_text", "InklingAttention passes position_bias"),
        ("mamba", "takes no position_ids"),
        ("bloom", "attends outside transformers' attention interface"),
        ("deepseek_v32", "fails under the attention interface with TypeError"),
    ],
)
def test_family_is_refused_with_the_reason(family, reason):
    found = verdict(family)
    assert found.verdict == "refused"
    assert reason in found.reason


def test_comparison_finds_what_the_probe_refuses():
    """Without the probe a short convolution misses the other rank's tokens, and that shows."""
    assert verdict("lfm2", check=False).verdict == "wrong"
    assert verdict("roberta", check=False).verdict == "wrong"


def test_dynamic_rotation_is_refused():
    config = families.tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = type(families.tiny_model("llama"))._from_config(config)
    mesh = LocalWorld({}).mesh(0)
    with pytest.raises(UnsupportedModel, match="rotary frequencies of kind dynamic"):
        parallelize(model, Context(), mesh=mesh)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_backward_attends_over_the_mesh_again(reentrant):
    batch = {"input_ids": ids(), "labels": ids()}

    def gradients(mesh, plan, checkpointing):
        model = families.tiny_model("llama").train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        with parallelize(model, plan, mesh=mesh):
            model(**shard(batch, mesh, plan)).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad

    plain = LocalWorld({}).run(lambda mesh: gradients(mesh, Context(), False))[0]
    parts = on_threads(lambda mesh: gradients(mesh, RING, True))
    torch.testing.assert_close(sum(parts), plain, rtol=1e-9, atol=1e-12)


def test_packed_documents_do_not_see_one_another():
    lengths, tokens = (5, 0, 9, 8), ids(batch=1)
    model = families.tiny_model("llama")
    alone = [model(input_ids=part).logits for part in tokens.split(lengths, 1) if part.shape[1]]

    def body(mesh):
        bound = families.tiny_model("llama")
        with parallelize(bound, RING, mesh=mesh):
            own = shard({"input_ids": tokens}, mesh, RING, documents=lengths)
            out = bound(**own).logits
        return out, shard(torch.cat(alone, 1), mesh, RING, documents=lengths)

    for out, right in on_threads(body):
        torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-12)


def test_losses_of_documents_stop_at_their_ends():
    tokens, lengths = ids(batch=1), (5, 17)
    mesh = LocalWorld({}).mesh(0)
    own = shard({"input_ids": tokens, "labels": tokens}, mesh, Context(), documents=lengths)
    assert own["num_items_in_batch"] == 22 - 2
    assert own["shift_labels"][0, 4] == -100
    assert own["shift_labels"][0, 5] == tokens[0, 6]
    assert own["position_ids"].tolist() == [[*range(5), *range(17)]]


def test_two_plans_in_one_process():
    """Two models, two plans, calls interleaved; neither notices the other."""
    tokens = ids(tokens=24)
    right = families.tiny_model("llama")(input_ids=tokens).logits
    one, two = Context(ring=4), Context(ring=2, ulysses=2)

    def body(mesh_pair):
        first, second = families.tiny_model("llama"), families.tiny_model("llama")
        with parallelize(first, one, mesh=mesh_pair(one)) as outer:
            mesh = mesh_pair(two)
            with parallelize(second, two, mesh=mesh):
                b = second(**shard({"input_ids": tokens}, mesh, two)).logits
                a = first(**shard({"input_ids": tokens}, outer.mesh, one)).logits
            again = first(**shard({"input_ids": tokens}, outer.mesh, one)).logits
        return a, again, shard(right, outer.mesh, one), b, shard(right, mesh, two)

    other = LocalWorld(two.sizes)
    world = LocalWorld(one.sizes)
    other.turn = world.turn

    def rank(mesh):
        return body(lambda plan: mesh if plan is one else other.mesh(mesh.world_rank))

    for a, again, first, b, second in world.run(rank):
        torch.testing.assert_close(a, first, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b, second, rtol=1e-10, atol=1e-12)
        assert torch.equal(a, again)


def everything(model):
    """Whatever binding could have left behind."""
    hooks = [
        (len(part._forward_pre_hooks), len(part._forward_hooks), SEAT in part.__dict__)
        for part in model.modules()
    ]
    return hooks, model.config._attn_implementation, [part.training for part in model.modules()]


def test_leaving_restores_the_model():
    model = families.tiny_model("llama").train()
    model.lm_head.eval()
    before, tokens = everything(model), ids()
    right = model(input_ids=tokens).logits
    mesh = LocalWorld({}).mesh(0)
    with parallelize(model, Context(), mesh=mesh) as handle:
        assert everything(model) != before
        assert handle.bound == tuple(f"model.layers.{n}.self_attn" for n in range(3))
    assert everything(model) == before
    assert torch.equal(model(input_ids=tokens).logits, right)
    handle.undo()
    assert everything(model) == before


def test_a_refused_model_is_left_as_it_was():
    model = families.tiny_model("lfm2")
    before = everything(model)
    with pytest.raises(UnsupportedModel):
        parallelize(model, Context(), mesh=LocalWorld({}).mesh(0))
    assert everything(model) == before


def test_a_model_that_shares_its_configuration_computes_on_its_own():
    model = families.tiny_model("mistral")
    other = type(model)(model.config).double().eval()
    assert other.config is model.config
    other.load_state_dict(model.state_dict())
    tokens = ids()
    right = other(input_ids=tokens).logits
    with parallelize(model, Context(), mesh=LocalWorld({}).mesh(0)):
        assert other.config._attn_implementation == "stretto"
        torch.testing.assert_close(other(input_ids=tokens).logits, right, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def bound():
    model = families.tiny_model("llama")
    mesh = LocalWorld({}).mesh(0)
    with parallelize(model, Context(), mesh=mesh):
        yield model, mesh


def test_bound_twice_is_refused(bound):
    with pytest.raises(UnsupportedModel, match="bound to a plan already"):
        parallelize(bound[0], Context(), mesh=bound[1])


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "position_ids are required"),
        ({"position_ids": [0, 1, 0, 1]}, "documents are not given"),
        ({"position_ids": [0, 1, 2, 3], "attention_mask": [1, 1, 1, 0]}, "hides 1 of 4 tokens"),
        ({"position_ids": [0, 1, 2, 3], "labels": [5, 6, 7, 8]}, "labels without shift_labels"),
        ({"position_ids": [0, 1, 2, 3], "use_cache": True}, "use_cache with a plan"),
        ({"position_ids": [0, 1, 2, 3], "output_attentions": True}, "output_attentions"),
    ],
)
def test_inputs_that_a_shard_cannot_have(bound, inputs, reason):
    inputs = {
        name: torch.tensor([value]) if isinstance(value, list) else value
        for name, value in inputs.items()
    }
    with pytest.raises(UnsupportedModel, match=reason):
        bound[0](input_ids=torch.tensor([[5, 6, 7, 8]]), **inputs)


def cut_otherwise(tokens, mesh):
    return shard({"input_ids": tokens}, mesh, Context(ring=2, layout="contiguous"))


def with_gaps(tokens, mesh):
    batch = shard({"input_ids": tokens}, mesh, RING)
    return batch | {"position_ids": batch["position_ids"] * 3 + 1}


def not_cut(tokens, mesh):
    return {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1])[None]}


def other_documents(tokens, mesh):
    return shard({"input_ids": tokens}, mesh, RING, documents=(15, 7)) | {"documents": (7, 15)}


@pytest.mark.parametrize("cut", [cut_otherwise, not_cut, other_documents])
def test_tokens_that_are_not_where_the_layout_puts_them(cut):
    """Attention would be over other distances than the positions say, on some rank or on all."""

    def body(mesh):
        model = families.tiny_model("llama")
        with parallelize(model, RING, mesh=mesh, check=False):
            model(**cut(ids(), mesh))

    with pytest.raises(ShapeError, match=r"position_ids .* on cp rank .* of (22|44) tokens over 2"):
        on_threads(body)


def test_positions_with_gaps_are_the_callers_own():
    right = families.tiny_model("llama")(
        input_ids=ids(), position_ids=torch.arange(22)[None] * 3 + 1
    ).logits

    def body(mesh):
        model = families.tiny_model("llama")
        with parallelize(model, RING, mesh=mesh, check=False):
            return model(**with_gaps(ids(), mesh)).logits, shard(right, mesh, RING)

    for found, expected in on_threads(body):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_rank_without_tokens_is_refused_by_all():
    def body(mesh):
        model = families.tiny_model("llama")
        batch = shard({"input_ids": ids()[:, :1]}, mesh, RING)
        with (
            parallelize(model, RING, mesh=mesh, check=False),
            pytest.raises(ShapeError, match="1 tokens over 2 ranks, cp rank 1 has none"),
        ):
            model(**batch)
        return True

    assert on_threads(body) == [True, True]


@pytest.mark.parametrize(
    ("batch", "options", "error", "words"),
    [
        ({"input_ids": ids()[0]}, {}, ShapeError, r"input_ids \(shape \(22,\)\)"),
        ({"input_ids": [[5, 6]]}, {}, ShapeError, r"input_ids \(list\)"),
        (ids()[0], {}, ShapeError, r"expected a tensor \(batch, tokens"),
        ({"labels": ids()}, {}, ShapeError, "input_ids or inputs_embeds"),
        ({"input_ids": ids(), "labels": ids()}, {"documents": [20, 4]}, ShapeError, "sum to 24"),
        (ids(), {"plan": Context(ring=3)}, PlanMismatch, "over 3 ranks, .* cp axis has 1"),
    ],
)
def test_batches_that_cannot_be_cut(batch, options, error, words):
    options = {"plan": Context(), **options}
    with pytest.raises(error, match=words):
        shard(batch, LocalWorld({}).mesh(0), **options)


def test_documents_may_be_given_as_any_list_of_lengths():
    mesh = LocalWorld({}).mesh(0)
    lengths = [[15, 7], torch.tensor([15, 7]), (15, 7)]
    found = [shard({"input_ids": ids()}, mesh, Context(), documents=n) for n in lengths]
    assert [part["documents"] for part in found] == [(15, 7)] * 3


def test_autocast_reaches_attention():
    """Rotated queries are float32 beside bfloat16 values, as with SDPA."""
    model = families.tiny_model("llama").float()
    mesh = LocalWorld({}).mesh(0)
    with torch.autocast("cpu", torch.bfloat16):
        right = model(input_ids=ids()).logits
        with parallelize(model, Context(), mesh=mesh):
            found = model(**shard({"input_ids": ids()}, mesh, Context())).logits
    torch.testing.assert_close(found, right, rtol=0, atol=0.02 * right.abs().max().item())


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = type(families.tiny_model("llama"))(families.tiny_config("llama"))
    with pytest.raises(UnsupportedModel, match="has no weights yet"):
        parallelize(model, Context(), mesh=LocalWorld({}).mesh(0))


def test_dropout_is_refused():
    config = copy.deepcopy(families.tiny_config("llama"))
    config.attention_dropout = 0.1
    model = type(families.tiny_model("llama"))._from_config(config).train()
    mesh = LocalWorld({}).mesh(0)
    with (
        parallelize(model, Context(), mesh=mesh),
        pytest.raises(UnsupportedModel, match=r"attention dropout 0\.1"),
    ):
        model(**shard({"input_ids": ids()}, mesh, Context()))


def test_plan_and_mesh_must_agree():
    with pytest.raises(PlanMismatch, match="over 2 ranks, the mesh's cp axis has 1"):
        parallelize(families.tiny_model("llama"), RING, mesh=LocalWorld({}).mesh(0))


def judged(mesh, names):
    return [support.examine(name, mesh, RING).as_dict() for name in names]


@pytest.mark.ranks
def test_processes_agree_with_one_rank():
    found = run_ranks(judged, RING.sizes, ["llama", "mistral", "lfm2"], timeout_s=100)
    assert [row["verdict"] for row in found[0]] == ["equal", "equal", "refused"]
    assert [row["verdict"] for row in found[1]] == ["equal", "equal", "refused"]
