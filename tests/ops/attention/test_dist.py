"""Attention over virtual ranks against naive on one, in float64; bytes as declared."""

import re

import pytest
import torch

import stretto
from stretto.errors import (
    ConfigError,
    PlanMismatch,
    RankLost,
    RanksDisagree,
    ShapeError,
    UnsupportedModel,
)
from stretto.mesh.local import LocalWorld
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.context import (
    Context,
    DoubleRing,
    Gather,
    Ring,
    StarTrail,
    Tile,
    named_points,
)
from stretto.plan.ranges import FULL, Mask
from tests.ops.attention.whole import NAMES, Inputs, indices, run_whole

CAUSAL = Mask(causal=True)
MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "window": Mask(causal=True, window=7),
    "band": Mask(window=4),
    "documents": Mask(causal=True, documents=(20, 0, 7, 3, 19)),
    "prefix": Mask(causal=True, prefix=5),
}


def check(context, inputs):
    whole = run_whole(context, inputs)
    whole.assert_close(inputs)
    whole.assert_bytes()


# ---- every named point -------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_named_points_are_exact_and_send_what_they_declare(ranks, mask):
    """Uneven: 49 tokens; 12 query and 4 key heads, so Ulysses 3, 6, 12 copy heads or fail."""
    inputs = Inputs(49, heads=(12, 4), mask=MASKS[mask])
    for context in named_points(ranks, 12, 4).values():
        check(context, inputs)


@pytest.mark.parametrize(("ranks", "mask"), [(6, "causal"), (8, "window"), (9, "documents")])
def test_named_points_of_more_ranks(ranks, mask):
    inputs = Inputs(49, heads=(ranks, ranks if ranks == 9 else 2), mask=MASKS[mask])
    for context in named_points(ranks, *inputs.heads).values():
        check(context, inputs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("ranks", [8, 12, 16, 18, 27, 32, 64])
def test_named_points_of_many_ranks(ranks, mask):
    documents = Mask(causal=True, documents=(70, 0, 20, 41))
    inputs = Inputs(
        131, heads=(ranks, ranks), mask=documents if mask == "documents" else MASKS[mask]
    )
    for context in named_points(ranks, *inputs.heads).values():
        check(context, inputs)


@pytest.mark.parametrize("name", ["startrail(4)", "tile(8)", "ulysses(8) x tile(2)"])
def test_64_ranks(name):
    check(Context.named(name, 64), Inputs(130, heads=(8, 8), head_dim=4, mask=CAUSAL))


@pytest.mark.parametrize(
    "inputs",
    [
        Inputs(2, 5, heads=(12, 4), mask=Mask(causal=True, window=1, q_offset=3)),
        Inputs(20, 45, heads=(12, 4), mask=Mask(causal=True, window=3, q_offset=25)),
        Inputs(20, 45, heads=(12, 4), mask=Mask(window=4, q_offset=10)),
        Inputs(20, 45, heads=(12, 4), mask=Mask(causal=True, q_offset=5)),
        Inputs(9, 5, heads=(12, 4), mask=Mask(window=2, q_offset=0)),
    ],
    ids=["two rows", "causal window", "band", "keys after all queries", "queries after all keys"],
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_keys_that_no_query_sees(ranks, inputs):
    """A rank sets out with all of its keys, so pieces must count the rows nobody needs too."""
    for context in named_points(ranks, 12, 4).values():
        check(context, inputs)


# ---- levels, movement, keeping -----------------------------------------------------------------

TWO_LEVEL = {
    "double-ring 2x3": Context(ring=6, schedule=DoubleRing(inner=3)),
    "double-ring 3x2 far": Context(ring=6, schedule=DoubleRing(inner=2, keep="far")),
    "double-ring all": Context(ring=4, schedule=DoubleRing(inner=2, keep="all")),
    "double-ring wire": Context(ring=4, schedule=DoubleRing(inner=2, grad_wire="float32")),
    "tile 2x2 in 2x2": Context(team=4, ring=4, schedule=Tile(team_inner=2, ring_inner=2)),
    "tile team inner": Context(team=4, ring=2, schedule=Tile(team_inner=2)),
    "tile far": Context(team=2, ring=4, schedule=Tile(ring_inner=2, keep="far")),
    "tile all": Context(team=4, ring=4, schedule=Tile(team_inner=2, ring_inner=2, keep="all")),
    "ulysses tile": Context(ulysses=2, team=2, ring=4, schedule=Tile(ring_inner=2, keep="far")),
    "unpruned": Context(team=2, ring=4, schedule=Tile(ring_inner=2, prune=False)),
}
ONE_LEVEL = {
    "ring owner": Context(ring=4, schedule=Ring()),
    "ring far": Context(ring=4, schedule=Ring(keep="far")),
    "ring ride pruned": Context(ring=4, schedule=Ring(gradients="ride")),
    "ring ride kept": Context(ring=4, schedule=Ring(gradients="ride", keep="all", prune=False)),
    "ring moves q": Context(ring=4, schedule=Ring(circulate="q")),
    "gather kept": Context(ring=4, schedule=Gather(keep="all")),
    "tile kept": Context(team=2, ring=2, schedule=Tile(keep="all")),
    "ulysses gather": Context(ulysses=2, ring=2, schedule=Gather()),
}
STARTRAIL = {
    f"startrail {c} {keep} u{u}": Context(
        ulysses=u, team=2, ring=4, schedule=StarTrail(circulate=c, keep=keep)
    )
    for c in ("q", "kv")
    for keep, u in (("none", 2), ("far", 1), ("all", 1))
}


@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("name", TWO_LEVEL | ONE_LEVEL | STARTRAIL)
def test_options_of_the_schedules(name, mask):
    context = (TWO_LEVEL | ONE_LEVEL | STARTRAIL)[name]
    check(context, Inputs(41, heads=(4, 2), mask=MASKS[mask], batch=2, head_dim=4))


SHAPES = {
    "cross": Inputs(30, 70),
    "cross causal": Inputs(20, 45, mask=Mask(causal=True, q_offset=25)),
    "queries before keys": Inputs(20, 30, mask=Mask(causal=True, q_offset=-4)),
    "ranks without rows": Inputs(3, mask=CAUSAL),
    "one token": Inputs(1),
    "no tokens": Inputs(0),
    "no keys": Inputs(5, 0, mask=Mask(q_offset=0)),
    "one head dim": Inputs(24, head_dim=1, mask=CAUSAL),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_are_easily_forgotten(shape):
    points = named_points(4, 4, 4) | {
        "two levels": Context(team=2, ring=4, schedule=Tile(ring_inner=2)),
        "startrail kv": Context(team=2, ring=2, schedule=StarTrail(circulate="kv")),
    }
    for context in points.values():
        check(context, SHAPES[shape])


@pytest.mark.parametrize(("u", "heads"), [(4, (8, 2)), (4, (4, 1)), (8, (8, 2)), (2, (6, 2))])
def test_more_ulysses_ranks_than_key_heads(u, heads):
    check(Context(ulysses=u, ring=8 // u), Inputs(33, heads=heads, mask=CAUSAL))


def test_ranges_written_out():
    layout = (((0, 3), (20, 24)), ((3, 9),), (), ((9, 20),))
    check(Context(ring=4, layout=layout), Inputs(24, mask=CAUSAL))
    check(Context(ulysses=2, team=2, layout=layout), Inputs(24, mask=CAUSAL))


def test_a_row_without_keys_is_zero_everywhere():
    inputs = Inputs(12, 12, mask=Mask(causal=True, q_offset=-3))
    out, lse, dq, _, _ = run_whole(Context(team=2, ring=2), inputs).results
    assert torch.equal(lse[:, :, :3], torch.full_like(lse[:, :, :3], float("-inf")))
    assert not out[:, :, :3].any()
    assert not dq[:, :, :3].any()


# ---- relations between plans -------------------------------------------------------------------


def same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.results, other.results, strict=True))


def test_a_team_of_one_is_the_ring_bit_by_bit():
    inputs = Inputs(40, heads=(4, 2), mask=CAUSAL, dtype=torch.float32)
    ring = run_whole(Context(ring=5, schedule=Ring()), inputs)
    same_bits(ring, run_whole(Context(ring=5, schedule=Tile()), inputs))
    same_bits(ring, run_whole(Context(ring=5, schedule=StarTrail(circulate="kv")), inputs))
    same_bits(ring, run_whole(Context.named("ring", 5), inputs))


def test_an_inner_degree_of_all_is_one_level():
    inputs = Inputs(40, mask=CAUSAL)
    flat = run_whole(Context(team=2, ring=4), inputs)
    tile = Tile(team_inner=2, ring_inner=4)
    same_bits(flat, run_whole(Context(team=2, ring=4, schedule=tile), inputs))


def test_pruning_changes_bytes_and_no_bits():
    """Zigzag, descending: the high half of a block stops at rank 0, on average half way."""
    inputs = Inputs(64, mask=CAUSAL)
    pruned = run_whole(Context(ring=8), inputs)
    whole = run_whole(Context(ring=8, schedule=Tile(prune=False)), inputs)
    same_bits(pruned, whole)
    sent = [
        sum(traffic.total(phase="column") for traffic in run.traffic.values())
        for run in (pruned, whole)
    ]
    assert 4 * sent[0] == 3 * sent[1]


def test_what_is_kept_changes_bytes_and_no_bits():
    inputs = Inputs(48, heads=(4, 2), mask=CAUSAL)
    tile = {keep: Tile(ring_inner=2, keep=keep) for keep in ("none", "far", "all")}
    runs = {keep: run_whole(Context(team=2, ring=4, schedule=tile[keep]), inputs) for keep in tile}
    same_bits(runs["none"], runs["far"])
    same_bits(runs["none"], runs["all"])
    again = {keep: runs[keep].traffic[3].total(phase="back-column") for keep in tile}
    assert again["none"] > again["far"] > again["all"] == 0
    assert runs["far"].traffic[3].total(phase="back-column", axis="ring_out") == 0


def test_where_ranks_are_placed_changes_nothing():
    context = Context(ulysses=2, team=2, ring=2)
    inputs = Inputs(40, mask=CAUSAL)
    order = ("ulysses", "team_out", "cfg", "ring_out", "fsdp", "team_in", "step", "ring_in")
    sizes = {axis: ({"step": 1, "fsdp": 1, "cfg": 1} | context.sizes)[axis] for axis in order}
    same_bits(run_whole(context, inputs), run_whole(context, inputs, sizes=sizes))


def test_a_window_of_everything_is_causal():
    wide = Inputs(40, mask=Mask(causal=True, window=40))
    causal = Inputs(40, mask=CAUSAL)
    context = Context(team=2, ring=2, layout="zigzag")
    same_bits(run_whole(context, wide), run_whole(context, causal))


def test_documents_are_separate_calls():
    context = Context(ring=3)
    packed = run_whole(context, Inputs(36, mask=Mask(causal=True, documents=(16, 20)))).results
    inputs = Inputs(36)
    for start, end in ((0, 16), (16, 36)):
        q, k, v, dout = (x[:, :, start:end] for x in inputs.tensors)
        alone = Inputs(end - start, mask=CAUSAL)
        alone.__dict__["tensors"] = (q, k, v, dout)
        for got, expected in zip(packed, alone.expected, strict=True):
            torch.testing.assert_close(got[:, :, start:end], expected, rtol=0, atol=1e-12)


def rms(x, ref):
    """Error relative to the size of what it is an error of."""
    return ((x.double() - ref).square().mean() / ref.square().mean()).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_short_dtypes_are_those_of_one_device(dtype):
    """Half as much again at most, whatever the number of partial results and their way."""
    inputs = Inputs(128, heads=(8, 4), head_dim=16, mask=CAUSAL, dtype=dtype)
    alone = run_whole(Context(), inputs).results
    costs = [rms(x, ref) for x, ref in zip(alone, inputs.exact, strict=True)]
    for name in ("ring", "startrail(2)", "tile(2)", "double-ring(2)", "ulysses(2) x tile(2)"):
        got = run_whole(Context.named(name, 8), inputs).results
        for what, x, ref, cost in zip(NAMES, got, inputs.exact, costs, strict=True):
            assert rms(x, ref) <= 1.5 * max(cost, torch.finfo(torch.float32).eps), (name, what)


# ---- gradients -----------------------------------------------------------------------------------


class _Ranks(torch.autograd.Function):
    """All virtual ranks as one function: autograd's one thread could not serve them."""

    @staticmethod
    def forward(ctx, q, k, v, context, case):
        rows = [indices(r) for r in case.q_rows]

        def body(mesh):
            rank = mesh.rank("cp")
            local = [x[:, :, rows[rank]] for x in (q, k, v)]
            return forward_rank(*local, mesh=mesh, context=context, case=case.at(rank))

        ctx.found, ctx.rows, ctx.sizes = LocalWorld(context.sizes).run(body), rows, context.sizes
        out = torch.empty_like(q)
        for rank, (part, _, _) in enumerate(ctx.found):
            out[:, :, rows[rank]] = part
        return out

    @staticmethod
    def backward(ctx, dout):
        def body(mesh):
            from dataclasses import replace

            rank = mesh.rank("cp")
            saved = ctx.found[rank][2]
            saved = replace(saved, job=replace(saved.job, mesh=mesh))
            return backward_rank(dout[:, :, ctx.rows[rank]], saved)

        whole = None
        for rank, grads in enumerate(LocalWorld(ctx.sizes).run(body)):
            whole = whole or [x.new_zeros(*x.shape[:2], dout.shape[2], x.shape[3]) for x in grads]
            for total, grad in zip(whole, grads, strict=True):
                total[:, :, ctx.rows[rank]] = grad
        return *whole, None, None


@pytest.mark.parametrize("name", ["ring", "startrail(2)", "tile(2)", "ulysses", "kv-allgather"])
def test_gradcheck(name):
    inputs = Inputs(6, heads=(4, 4), head_dim=2, mask=CAUSAL)
    context = Context.named(name, 4)
    case = inputs.case(context, return_lse=False)
    tensors = [x.clone().requires_grad_() for x in inputs.tensors[:3]]
    assert torch.autograd.gradcheck(
        lambda q, k, v: _Ranks.apply(q, k, v, context, case), tensors, fast_mode=True
    )


# ---- the public operator -------------------------------------------------------------------------


def test_one_rank_with_autograd():
    inputs = Inputs(20, heads=(4, 2), mask=CAUSAL)
    q, k, v, dout = inputs.tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = stretto.attention(*leaves, causal=True, return_lse=True)
    out.backward(dout)
    found = (out.detach(), lse, *(x.grad for x in leaves))
    for got, expected in zip(found, inputs.expected, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert not lse.requires_grad


def on_ranks(body, sizes=None):
    return LocalWorld(sizes or {"ring_out": 2, "ulysses": 2}, timeout_s=20).run(body)


@pytest.mark.parametrize("told", [True, False])
def test_ranks_with_autograd(told):
    """The plan follows from the mesh; lengths are told, or asked from the other ranks."""
    inputs = Inputs(21, heads=(4, 2), mask=CAUSAL)
    context = Context(ring=2, ulysses=2)
    case = inputs.case(context)
    q, k, v, dout = inputs.tensors

    def body(mesh):
        at = indices(case.q_rows[mesh.rank("cp")])
        leaves = [x[:, :, at].requires_grad_() for x in (q, k, v)]
        for _ in range(2):
            for leaf in leaves:
                leaf.grad = None
            out = stretto.attention(*leaves, mesh=mesh, causal=True, tokens=21 if told else None)
            out.backward(dout[:, :, at])
        return at, (out.detach(), *(x.grad for x in leaves))

    expected = inputs.expected[0], *inputs.expected[2:]
    for at, found in on_ranks(body):
        for got, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(got, whole[:, :, at], rtol=0, atol=1e-12)


def test_checkpoint_around_attention():
    from torch.utils.checkpoint import checkpoint

    inputs = Inputs(16, mask=CAUSAL)
    q, k, v, dout = inputs.tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = checkpoint(lambda *x: stretto.attention(*x, causal=True), *leaves, use_reentrant=False)
    out.backward(dout)
    torch.testing.assert_close(leaves[1].grad, inputs.expected[3], rtol=0, atol=1e-12)


def over_ranks(inputs, differentiate, context):
    """`differentiate(q, k, v, dout, call)` on every rank's rows, against the whole."""
    case = inputs.case(context)
    tensors = inputs.tensors

    def body(mesh):
        at = indices(case.q_rows[mesh.rank("cp")])
        q, k, v, dout = (x[:, :, at] for x in tensors)

        def call(*leaves):
            return stretto.attention(*leaves, mesh=mesh, plan=context, causal=True)

        return at, differentiate(q, k, v, dout, call)

    for at, grads in LocalWorld(context.sizes, timeout_s=20).run(body):
        for got, whole in zip(grads, inputs.expected[2:], strict=True):
            if got is not None:
                torch.testing.assert_close(got, whole[:, :, at], rtol=0, atol=1e-12)


KEPT = Context(team=2, ring=2, schedule=StarTrail(keep="far"))
POINTS = [Context(ring=2), Context(ulysses=2, ring=2), KEPT, Context(team=2, ring=5)]


@pytest.mark.parametrize("context", POINTS, ids=Context.short)
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_gradients_of_one_input(context, chosen):
    """Seven tokens: on ten ranks some hold none, and take part all the same."""

    def one(q, k, v, dout, call):
        leaves = [x.clone() for x in (q, k, v)]
        leaves[chosen].requires_grad_()
        call(*leaves).backward(dout)
        return [x.grad for x in leaves]

    over_ranks(Inputs(7, heads=(4, 2), mask=CAUSAL), one, context)


@pytest.mark.parametrize("context", POINTS, ids=Context.short)
def test_backward_again_after_keys_changed_and_with_strided_gradients(context):
    def twice(q, k, v, dout, call):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        inputs = [x * 1.0 for x in leaves]
        out = call(*inputs)
        for x in inputs[1:]:
            x.detach().zero_()  # of keys forward holds copies, packed to travel
        strided = dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        first = torch.autograd.grad(out, leaves, strided, retain_graph=True)
        again = torch.autograd.grad(out, leaves, strided)
        assert all(map(torch.equal, first, again))
        with pytest.raises(RuntimeError, match="a second time"):
            out.backward(strided)
        return again

    over_ranks(Inputs(13, heads=(4, 2), mask=CAUSAL), twice, context)


def test_gradients_of_gradients_are_refused():
    q, k, v, dout = (x.clone().requires_grad_() for x in Inputs(8).tensors)
    (dq,) = torch.autograd.grad(stretto.attention(q, k, v), q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode):
    q, k, v, _ = (x.clone().requires_grad_() for x in Inputs(8).tensors)
    with mode():
        out = stretto.attention(q, k, v)
    assert out.grad_fn is None
    assert torch.equal(out, stretto.attention(q, k, v).detach())


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_autocast_rounds_nothing(backend):
    """Inputs decide the dtype; products in bfloat16 would spoil float32 statistics."""
    q, k, v, _ = Inputs(8, dtype=torch.float32).tensors
    right = stretto.attention(q, k, v, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stretto.attention(q, k, v, backend=backend), right)


@pytest.mark.parametrize("what", ["out", "lse"])
def test_results_changed_in_place_before_backward_are_no_silent_error(what):
    q, k, v, _ = (x.clone().requires_grad_() for x in Inputs(8).tensors)
    out, lse = stretto.attention(q, k, v, return_lse=True)
    {"out": out.detach(), "lse": lse}[what].zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_saved_tensors_pass_through_hooks():
    """So that activations can be offloaded: nothing large hides on the graph's node."""
    q, k, v, _ = Inputs(16).tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x)
    with hooks:
        stretto.attention(*leaves)
    assert sum(x.numel() * x.element_size() for x in packed) >= 4 * q.numel() * 8


def test_ranks_that_disagree_hear_in_what():
    q, k, v, _ = Inputs(8).tensors

    def body(mesh):
        stretto.attention(q, k, v, mesh=mesh, causal=mesh.rank("cp") != 2)

    with pytest.raises(RanksDisagree, match=r"cp ranks \[2\]: mask: Mask\(causal=False"):
        on_ranks(body)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"return_lse": True}, "return_lse: True"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "sinks: True"),
        ({"tokens": 32}, "tokens: (32, 32)"),
        ({}, "gradients: True"),
    ],
)
def test_ranks_that_would_wait_for_one_another_in_vain(options, field):
    """What one rank alone asks for, and the others would neither send nor receive."""
    q, k, v, _ = Inputs(8).tensors

    def body(mesh):
        odd = mesh.rank("cp") == 1
        own = q.clone().requires_grad_(odd and not options)
        stretto.attention(own, k, v, mesh=mesh, **(options if odd else {}))

    with pytest.raises(RanksDisagree, match=re.escape(f"cp ranks [1]: {field}")):
        on_ranks(body)


def test_rows_of_one_rank_that_change_later_end_all():
    """Where lengths are told nobody asks again, so the rank that finds out tells its peers."""
    x = torch.zeros(1, 4, 4, 8)

    def body(mesh):
        for rows in (4, 3 if mesh.rank("cp") == 1 else 4):
            own = x[:, :, :rows]
            stretto.attention(own, own, own, mesh=mesh, tokens=16)

    world = LocalWorld({"ring_out": 4}, timeout_s=20)
    with pytest.raises(ShapeError, match=r"q has 3 rows on cp rank 1; .* gives it 4"):
        world.run(body)
    assert isinstance(world.failed[0], RankLost)


def test_rows_that_the_layout_does_not_give_are_refused_by_all():
    def body(mesh):
        rows = 9 if mesh.rank("cp") == 0 else 5
        x = torch.zeros(1, 4, rows, 8)
        with pytest.raises(ShapeError, match=r"q has 9 rows on cp rank 0; .* gives it 6"):
            stretto.attention(x, x, x, mesh=mesh)
        return True

    assert on_ranks(body) == [True] * 4


def test_a_rank_that_raises_ends_the_others():
    x = torch.zeros(1, 4, 4, 8)

    def body(mesh):
        if mesh.rank("cp") == 1:
            raise KeyError("gone")
        stretto.attention(x, x, x, mesh=mesh, tokens=16)

    world = LocalWorld({"ring_out": 4}, timeout_s=20)
    with pytest.raises(KeyError):
        world.run(body)
    assert isinstance(world.failed[0], RankLost)


TENSOR = torch.zeros(1, 4, 8, 8)
KEYS = torch.zeros(1, 2, 8, 8)
REFUSED = {
    "three dims": ((TENSOR[0], KEYS, KEYS), {}, ShapeError, r"expected \(batch, heads, rows"),
    "k unlike v": ((TENSOR, KEYS, KEYS[:, :1]), {}, ShapeError, r"k is \(1, 2, 8, 8\) and v is"),
    "dtypes": ((TENSOR, KEYS.double(), KEYS.double()), {}, ShapeError, "dtype of q, k, v"),
    "batch": ((TENSOR.expand(2, -1, -1, -1), KEYS, KEYS), {}, ShapeError, "batch of q, k, v"),
    "heads": ((TENSOR[:, :3], KEYS, KEYS), {}, ShapeError, "3 query heads are no multiple of 2"),
    "window": ((TENSOR, KEYS, KEYS), {"window": 0}, ShapeError, "window=0"),
    "documents": ((TENSOR, KEYS, KEYS), {"documents": (3, 4)}, ShapeError, "sum to 7"),
    "offset": ((TENSOR[:, :, :5], KEYS, KEYS), {"causal": True}, ShapeError, "no q_offset"),
    "dropout": ((TENSOR, KEYS, KEYS), {"dropout_p": 0.1}, UnsupportedModel, "dropout"),
    "mask": ((TENSOR, KEYS, KEYS), {"attn_mask": TENSOR}, UnsupportedModel, "documents="),
    "back end": ((TENSOR, KEYS, KEYS), {"backend": "flash"}, ShapeError, "flash"),
    "no dtype for it": ((TENSOR.int(),) * 3, {}, ShapeError, "no attention back end takes int32"),
    "no head dim": ((TENSOR[..., :0],) * 3, {}, ShapeError, "head dim of 0"),
    "half a window": ((TENSOR, KEYS, KEYS), {"window": 2.5}, ShapeError, "window 2.5 is a float"),
    "half a row": ((TENSOR, KEYS, KEYS), {"documents": (3.5, 4.5)}, ShapeError, "3.5 is a float"),
    "one length": ((TENSOR, KEYS, KEYS), {"documents": 8}, ShapeError, "lengths of all documents"),
    "tokens": ((TENSOR, KEYS, KEYS), {"tokens": 9}, ShapeError, "q has 8 rows .* gives it 9"),
    "no tokens": ((TENSOR, KEYS, KEYS), {"tokens": 8.0}, ShapeError, "expected a length"),
    "scale": ((TENSOR, KEYS, KEYS), {"scale": float("nan")}, ConfigError, "a finite number"),
    "a name": (
        (TENSOR, KEYS, KEYS),
        {"plan": "ring"},
        PlanMismatch,
        r"'ring' is a str; expected a",
    ),
    "no mesh": ((TENSOR, KEYS, KEYS), {"plan": Context(ring=2)}, PlanMismatch, "needs 2 ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    tensors, options, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        stretto.attention(*tensors, **options)


def test_a_plan_that_the_mesh_has_not():
    def body(mesh):
        with pytest.raises(PlanMismatch, match=r"needs axes ring 1 x team 1 x ulysses 4, the mesh"):
            stretto.attention(TENSOR, TENSOR, TENSOR, mesh=mesh, plan=Context(ulysses=4))
        # Every rank would see its own keys only.
        with pytest.raises(PlanMismatch, match=r"cp1\(one rank, auto\) needs axes ring 1 x team 1"):
            stretto.attention(TENSOR, TENSOR, TENSOR, mesh=mesh, plan=Context())
        with pytest.raises(PlanMismatch, match="to fix: ulysses 1 x ring 4"):
            stretto.attention(TENSOR[:, :3], KEYS[:, :1], KEYS[:, :1], mesh=mesh)

    on_ranks(body)
