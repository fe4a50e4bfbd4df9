"""Closed forms against the formulas of the published systems and of the tile, in whole blocks."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.cost.attention_bytes import Call, by_phase, terms, total
from stretto.plan.context import named_points
from stretto.plan.options import AttentionCase, Context, DoubleRing, Ring, StarTrail, Tile
from stretto.plan.ranges import FULL, Mask, shard

#: Scalars are one item wide here and heads one dim wide, so that R is one block.
HEADS = 64


def call(kv_heads=HEADS, **changes):
    fields = {"batch": 1, "rows": 1, "kv_rows": 1, "heads": HEADS, "kv_heads": kv_heads}
    return Call(**fields | {"head_dim": 1, "item_bytes": 4, "scalar_bytes": 0} | changes)


def blocks(context, one, *, back=False):
    return Fraction(total(terms(context, one, back=back), context), one.q_block)


@pytest.mark.parametrize(
    ("name", "forward", "grouped"),
    [
        ("ring", 126, 31.5),
        ("double-ring(8)", 126, 31.5),
        ("kv-allgather", 126, 31.5),
        ("startrail(2)", 68, 18.5),
        ("startrail(4)", 44, 15.5),
        ("startrail(8)", 44, 21.5),
        ("tile(8)", 28, 17.5),
        ("ulysses(8) x tile(2)", 11.5, None),
    ],
)
def test_forward_blocks_at_64_ranks(name, forward, grouped):
    assert blocks(Context.named(name, 64), call()) == forward
    if grouped is not None:
        assert blocks(Context.named(name, 64), call(HEADS // 4)) == grouped


def test_usp_with_few_key_heads_replicates_only_the_excess():
    """32 query, 8 key heads at ulysses 8: 5.69 blocks; at ulysses 16 a key head is held twice."""
    few = call(8, heads=32)
    assert round(float(blocks(Context(ulysses=8, ring=8), few)), 2) == 5.69
    more = Context(ulysses=16, ring=4)
    g = Fraction(16, 32)
    assert blocks(more, few) == (2 + 2 * g) * Fraction(15, 16) + 2 * g * 3


@given(
    u=st.sampled_from([1, 2, 4, 8]),
    a=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    b=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kv_heads=st.sampled_from([4, 8, 64]),
)
def test_the_general_point(u, a, b, kv_heads):
    schedule = Tile(team_inner=a[1], ring_inner=b[1])
    context = Context(ulysses=u, team=a[0] * a[1], ring=b[0] * b[1], schedule=schedule)
    one = call(kv_heads)
    g = Fraction(max(u, kv_heads), HEADS)
    heads = (2 + 2 * g) * Fraction(u - 1, u)
    rows, column = a[0] * a[1] - 1, b[0] * b[1] - 1
    assert blocks(context, one) == heads + 2 * rows + 2 * g * column
    assert blocks(context, one, back=True) == heads + 3 * rows + 4 * g * column


@given(
    a=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    b=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    keep=st.sampled_from(["none", "far", "all"]),
)
def test_across_nodes_of_the_general_point(a, b, keep):
    schedule = Tile(team_inner=a[1], ring_inner=b[1], keep=keep)
    context = Context(team=a[0] * a[1], ring=b[0] * b[1], schedule=schedule)
    one = call(HEADS // 4)
    forward, back = (
        sum(
            sent
            for (_, axis), sent in by_phase(terms(context, one, back=way), context).items()
            if axis.endswith("_out")
        )
        for way in (False, True)
    )
    g = Fraction(1, 4)
    assert forward == one.q_block * (2 * (a[0] - 1) + 2 * g * (b[0] - 1))
    again = 0 if keep != "none" else 2 * g * (b[0] - 1)
    assert back == one.q_block * (3 * (a[0] - 1) + 2 * g * (b[0] - 1) + again)


@pytest.mark.parametrize("kv_heads", [64, 16, 8])
@pytest.mark.parametrize(("ranks", "c"), [(4, 2), (8, 2), (16, 4), (64, 2), (64, 4), (64, 8)])
def test_startrail_both_ways(ranks, c, kv_heads):
    g, length = Fraction(kv_heads, HEADS), ranks // c**2
    one = call(kv_heads)
    moved = {
        "q": 2 * c * (length - 1) + (c * length if length > 1 else 0),
        "kv": 2 * g * c * (length - 1) + (2 * g * c * length if length > 1 else 0),
    }
    for circulate, ring in moved.items():
        schedule = StarTrail(circulate=circulate)
        context = Context(team=c, ring=ranks // c, schedule=schedule)
        gathered = 2 * (c - 1) + 2 * g * (Fraction(ranks, c) + c - 1)
        assert blocks(context, one) == gathered
        assert blocks(context, one, back=True) == (3 + 4 * g) * (c - 1) + 4 * g * c + ring


def test_startrail_of_one_is_the_ring():
    one = call()
    ring, star = (Context(ring=8, schedule=each) for each in (Tile(), StarTrail()))
    for back in (False, True):
        assert blocks(ring, one, back=back) == blocks(star, one, back=back)


@pytest.mark.parametrize(("wire", "w"), [("input", 1), ("float32", 2)])
def test_gradients_that_ride(wire, w):
    one = call(16, item_bytes=2)
    schedule = Ring(gradients="ride", grad_wire=wire)
    context = Context(ring=8, schedule=schedule)
    g = Fraction(1, 4)
    assert blocks(context, one, back=True) == 2 * g * 7 + 2 * g * 8 * w
    owner = Context(ring=8, schedule=Ring(grad_wire=wire))
    assert blocks(owner, one, back=True) == 2 * g * 7 * (1 + w)


def test_scalars_travel_with_rows_and_heads():
    """Forward (a-1) R, backward (u-1)/u R + 2(a-1) R."""
    with_scalars, without = call(scalar_bytes=4), call()
    context = Context(ulysses=4, team=4, ring=2)
    assert with_scalars.scalars == with_scalars.q_block
    for back, scalars in ((False, 3), (True, Fraction(3, 4) + 6)):
        found = blocks(context, with_scalars, back=back) - blocks(context, without, back=back)
        assert found == scalars


def test_double_ring_splits_by_level():
    context = Context(ring=8, schedule=DoubleRing(inner=4))
    one = call()
    assert by_phase(terms(context, one, back=False), context) == {
        ("column", "ring_out"): 2 * one.q_block,
        ("column", "ring_in"): 2 * 2 * 3 * one.q_block,
    }


def declared(context, case, back):
    """Most bytes that any rank declares, per (phase, axis)."""
    most = Counter()
    for rank in range(context.degree):
        sent = Counter()
        for lane, count in context.wire(case.at(rank), ("backward",) if back else ("forward",)):
            sent[lane.phase, lane.axis] += count
        most |= sent
    return dict(most)


def both(context, *, heads=8, kv_heads=2, mask=FULL, return_lse=False):
    """(closed, declared) of both passes over equal shards."""
    rows, ranks = 4, context.degree
    shards = shard("zigzag" if mask.causal else "contiguous", rows * ranks, ranks, mask)
    shape = (heads, kv_heads, 4, 2)
    case = AttentionCase(2, *shape, shards, shards, mask, return_lse=return_lse)
    one = Call(2, rows, rows, *shape, case.stat_bytes, return_lse)
    return [
        (by_phase(terms(context, one, back=back), context), declared(context, case, back))
        for back in (False, True)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 9, 16])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_named_points_equal_their_schedules(ranks, kv_heads):
    for name, context in named_points(ranks, 8, kv_heads).items():
        for closed, sent in both(context, kv_heads=kv_heads, return_lse=True):
            assert closed == sent, name


@given(
    u=st.sampled_from([1, 2, 4]),
    a=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    b=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    keep=st.sampled_from(["none", "far", "all"]),
    wire=st.sampled_from(["input", "float32"]),
)
@settings(max_examples=30)
def test_two_level_tiles_equal_their_schedules(u, a, b, keep, wire):
    schedule = Tile(team_inner=a[1], ring_inner=b[1], keep=keep, grad_wire=wire)
    context = Context(ulysses=u, team=a[0] * a[1], ring=b[0] * b[1], schedule=schedule)
    for closed, sent in both(context):
        assert closed == sent


@pytest.mark.parametrize("circulate", ["q", "kv"])
@pytest.mark.parametrize("keep", ["none", "far"])
def test_other_options_equal_their_schedules(circulate, keep):
    star = StarTrail(circulate=circulate, keep=keep)
    ring = Ring(circulate=circulate, prune=False, grad_wire="float32")
    for context in (
        Context(team=2, ring=4, schedule=star),
        Context(ulysses=2, team=2, ring=2, schedule=star),
        Context(ring=4, schedule=ring),
    ):
        for mask in (FULL, Mask(causal=True)):
            for closed, sent in both(context, mask=mask):
                assert closed == sent


def test_a_wrong_closed_form_is_noticed():
    """Pruned blocks stop early on most ranks of a contiguous causal ring: that must not pass."""
    context = Context(ring=4, layout="contiguous")
    shards = shard("contiguous", 16, 4, Mask(causal=True))
    case = AttentionCase(1, 1, 1, 1, 2, shards, shards, Mask(causal=True, window=2))
    one = Call(1, 4, 4, 1, 1, 1, 2)
    assert declared(context, case, False) != by_phase(terms(context, one, back=False), context)
