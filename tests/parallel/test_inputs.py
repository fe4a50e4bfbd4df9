"""What a user may hand in by mistake: errors of stretto's tree that name it and a way out."""

import copy
import gc

import pytest
import torch
from torch import nn

import stretto
from stretto.errors import ConfigError, PlanMismatch, ShapeError, StrettoError, UnsupportedModel
from stretto.mesh.local import LocalWorld
from stretto.parallel.context import Attention
from stretto.plan.options import Data, Steps
from tests.parallel.test_sdpa import SelfAttention, model, tokens

ONE = stretto.Plan(kind="train")
IDS = torch.arange(8)[None]


def mesh():
    return LocalWorld({}).mesh(0)


@pytest.mark.parametrize("given", [None, "cuda", 4, torch.device("cpu"), ONE], ids=str)
def test_what_is_no_mesh_is_named(given):
    with pytest.raises(ConfigError, match=r"no Mesh\n.*why.*\n.*init_mesh\(plan\)"):
        stretto.parallelize(model(SelfAttention), ONE, mesh=given)
    with pytest.raises(ConfigError, match=r"no Mesh\n.*why.*\n.*init_mesh\(plan\)"):
        stretto.shard(IDS, given, ONE)


@pytest.mark.parametrize(
    "given", ["llama", None, SelfAttention, object()], ids=["str", "None", "class", "object"]
)
def test_what_is_no_model_is_named(given):
    with pytest.raises(ConfigError, match=r"(no torch module|the class)[\s\S]*to fix"):
        stretto.parallelize(given, ONE, mesh=mesh())


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("ring4", "is a str; expected a Context or a Plan"),
        (None, "is a NoneType"),
        ({"cp": 1}, "is a dict"),
        (2, "is a int"),
        (Data(shard=2), "is a Data"),
        (Steps(degree=2), "is a Steps"),
        (stretto.Plan(step=4), "belong to pipelines, see stretto.parallelized"),
        (stretto.Plan(cp=2), "over 2 ranks, the mesh's cp axis has 1"),
    ],
    ids=str,
)
def test_plans_of_another_kind_are_named(plan, words):
    with pytest.raises(PlanMismatch, match=words):
        stretto.parallelize(model(SelfAttention), plan, mesh=mesh())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("text", "batch is a str"),
        ([1, 2], "batch is a list"),
        (None, "batch is a NoneType"),
        ({"input_ids": IDS, "labels": IDS[:, :6]}, "labels of 6 tokens beside inputs of 8"),
        ({"input_ids": IDS, "labels": [1]}, r"labels \(list\)"),
        ({"input_ids": IDS, "labels": IDS[0]}, r"labels \(shape \(8,\)\)"),
    ],
)
def test_batches_that_are_none(batch, words):
    with pytest.raises(ShapeError, match=words):
        stretto.shard(batch, mesh(), ONE)


@pytest.mark.parametrize("make", [SelfAttention, Attention])
def test_a_model_stays_bound_when_nobody_keeps_the_handle(make):
    """A binding that ended with its handle would attend to this rank's keys only, in silence."""
    bound = model(make)
    stretto.parallelize(bound, ONE, mesh=mesh())
    gc.collect()
    with pytest.raises(UnsupportedModel, match="bound to a plan already"):
        stretto.parallelize(bound, ONE, mesh=mesh())


def test_a_handle_that_nobody_keeps_runs_over_the_mesh():
    x, plan = tokens(), stretto.Context(ring=2)
    right = model(SelfAttention)(x)

    def rank(mesh):
        bound = model(SelfAttention)
        stretto.parallelize(bound, plan, mesh=mesh)
        gc.collect()
        found = bound(stretto.shard(x, mesh, plan, causal=False))
        return (found - stretto.shard(right, mesh, plan, causal=False)).abs().max().item()

    assert max(LocalWorld(plan.sizes).run(rank)) < 1e-12


def test_a_handle_is_no_part_of_the_model():
    bound = model(SelfAttention)
    names, before = set(bound.state_dict()), set(bound.__dict__)
    handle = stretto.parallelize(bound, ONE, mesh=mesh())
    assert set(bound.state_dict()) == names
    assert not any(handle is part for part in bound.modules())
    copy.deepcopy(bound)
    handle.undo()
    handle.undo()
    assert set(bound.__dict__) == before


def test_two_handles_may_end_in_any_order():
    x = tokens()
    parts = [model(SelfAttention) for _ in range(2)]
    whole = nn.Sequential(*parts)
    right = whole(x)
    for first, second in ((0, 1), (1, 0)):
        handles = [stretto.parallelize(part, ONE, mesh=mesh()) for part in parts]
        handles[first].undo()
        torch.testing.assert_close(whole(x), right)
        handles[second].undo()
        assert torch.equal(whole(x), right)


def rows(*shape):
    return torch.zeros(1, *shape)


Q, K = rows(4, 8, 16), rows(2, 8, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"q": Q[0]},
        {"k": K.double(), "v": K.double()},
        {"k": K.to("meta"), "v": K.to("meta")},
        {"q": rows(5, 8, 16)},
        {"v": K[:, :, :4]},
        {"k": K[..., :8], "v": K[..., :8]},
        {"q": Q.long(), "k": K.long(), "v": K.long()},
        {"q": Q + 0j, "k": K + 0j, "v": K + 0j},
        {"plan": "ring"},
        {"plan": Steps(degree=2)},
        {"plan": stretto.Context(ring=2)},
        {"window": 0},
        {"window": 2.5},
        {"window": (2, 0)},
        {"documents": (4, 8)},
        {"documents": (4,)},
        {"documents": (-4, 12)},
        {"documents": 8},
        {"documents": "8"},
        {"documents": (4.0, 4.0)},
        {"k": K[:, :, :4], "v": K[:, :, :4], "causal": True},
        {"dropout_p": 0.1},
        {"attn_mask": torch.ones(8, 8)},
        {"scale": float("nan")},
        {"scale": "half"},
        {"q_offset": "1"},
        {"tokens": 7},
        {"tokens": "8"},
        {"backend": "fastest"},
        {"backend": None},
        {"sinks": torch.zeros(3)},
        {"sinks": [0.0] * 4},
        {"q": None},
        {"k": K.numpy()},
        {"mesh": "cuda"},
        {"causal": "yes"},
        {"attn_mask": "causal"},
        {"dropout_p": "0.1"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_attention_calls_that_cannot_be(changes):
    call = {"q": Q, "k": K, "v": K} | changes
    q, k, v = (call.pop(name) for name in "qkv")
    with pytest.raises(StrettoError) as told:
        stretto.attention(q, k, v, **call)
    assert len(str(told.value)) > 30


def test_gradients_of_some_inputs_only():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    alone = [
        x.clone().requires_grad_(name == "k") for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    every = [x.clone().requires_grad_() for x in (q, k, v)]
    for inputs in (alone, every):
        stretto.attention(*inputs, causal=True).square().sum().backward()
    assert alone[0].grad is None
    assert alone[2].grad is None
    assert torch.equal(alone[1].grad, every[1].grad)


def test_offsets_of_the_varlen_interface_are_lengths_after_diff():
    """flash-attention's `cu_seqlens`, int32 from 0 to the sum, over two ranks."""
    torch.manual_seed(1)
    offsets = torch.tensor([0, 3, 4, 4, 11, 16], dtype=torch.int32)
    q = torch.randn(1, 2, 16, 8, dtype=torch.float64)
    bounds = list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
    pieces = [q[:, :, a:b] for a, b in bounds if b > a]
    right = torch.cat([stretto.attention(p, p, p, causal=True) for p in pieces], 2)
    plan = stretto.Context(ring=2)

    def rank(mesh):
        options = {"documents": offsets.diff()}
        own, wanted = (
            stretto.shard(x.transpose(1, 2), mesh, plan, **options).transpose(1, 2)
            for x in (q, right)
        )
        out = stretto.attention(own, own, own, causal=True, mesh=mesh, plan=plan, **options)
        return (out - wanted).abs().max().item()

    assert max(LocalWorld(plan.sizes).run(rank)) < 1e-12
