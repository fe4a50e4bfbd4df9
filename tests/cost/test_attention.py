"""Seconds of attention plans against values derived by hand, and the properties they must have."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto import axes
from stretto.cluster.model import Cluster, Kernel
from stretto.cost.attention import block_rows, kernel_of, kernel_seconds, part_of_rate, pass_of
from stretto.cost.attention_bytes import Call, Term, terms
from stretto.cost.attention_links import fabric_of, load_of, pairs
from stretto.cost.attention_work import step_pairs
from stretto.plan.options import Context, DoubleRing, StarTrail, Tile
from stretto.plan.ranges import Mask
from tests.cluster.make import cluster, line, link, node

CAUSAL = Mask(causal=True)


def forward(name, tokens, heads, kv_heads, context, *, back=False):
    preset = Cluster.read(name)
    rows = tokens // preset.size
    call = Call(1, rows, rows, heads, kv_heads, 128, 2)
    kernel = kernel_of(preset.device(0), "bf16")
    pairs = step_pairs(context, tokens, CAUSAL)
    kernels = kernel_seconds(context, call, kernel, pairs, back=back)
    return pass_of(
        context, call, kernels, fabric_of(preset), axes.ordered(context.sizes), back=back
    )


#: Milliseconds forward with kernels and hops hidden behind one another completely (derived), and
#: with the last kernel behind the last hop, where that differs.
EXPECTED = [
    ("h100-8x8", 2**18, 32, 32, "ring", 85.2, 85.4),
    ("h100-8x8", 2**18, 32, 32, "startrail(4)", 22.9, 26.4),
    ("h100-8x8", 2**18, 32, 32, "usp(8)", 15.1, 15.1),
    ("h100-8x8", 2**18, 32, 32, "tile(8)", 16.2, 16.2),
    ("h100-8x8", 2**18, 4, 1, "ring", 3.3, 3.3),
    ("h100-8x8", 2**18, 4, 1, "startrail(2)", 2.0, 2.0),
    ("h100-8x8", 2**18, 4, 1, "tile(2)", 1.9, 1.9),
    ("a100-2x16", 2**17, 32, 32, "ring", 167, 168),
    ("a100-2x16", 2**17, 32, 32, "startrail(2)", 109, 109),
    ("a100-2x16", 2**17, 32, 32, "usp(16)", 86.5, 97.7),
    ("a100-4x8", 2**17, 32, 8, "ring", 42, 43.2),
    ("a100-4x8", 2**17, 32, 8, "startrail(4)", 55, 55.3),
    ("a100-4x8", 2**17, 32, 8, "usp(8)", 32.6, 38.2),
]


@pytest.mark.parametrize(("preset", "tokens", "heads", "kv", "name", "least", "whole"), EXPECTED)
def test_values_to_expect(preset, tokens, heads, kv, name, least, whole):
    ranks = Cluster.read(preset).size
    found = forward(preset, tokens, heads, kv, Context.named(name, ranks))
    assert found.least * 1e3 == pytest.approx(least, rel=0.03, abs=0.05)
    assert found.seconds * 1e3 == pytest.approx(whole, rel=0.01, abs=0.05)
    assert found.least <= found.seconds <= found.most


def test_compute_alone():
    h100 = forward("h100-8x8", 2**18, 32, 32, Context.named("usp(8)", 64))
    a100 = forward("a100-2x16", 2**17, 32, 32, Context.named("usp(16)", 32))
    assert h100.kernels * 1e3 == pytest.approx(14.7, rel=0.01)
    assert a100.kernels * 1e3 == pytest.approx(22, rel=0.01)


def test_an_interface_that_a_node_shares_carries_all_its_devices():
    """Ulysses 4 in the node, ring across: every device sends; a flat ring: one of them."""
    context = Context(ulysses=4, ring=2)
    hop = Term("column", "shift", "ring", 100)
    sizes = axes.ordered(context.sizes)

    def fabric(per):
        fields = cluster(
            nodes=[node(n, "d", 4) for n in "ab"],
            links=[link(within="a"), link(within="b"), link(between=("a", "b"))],
        ).model_dump()
        fields["links"] = fields["links"][:2]
        network = {"rate": 1e9, "latency": 0, "per": per}
        return fabric_of(Cluster.model_validate(fields | {"network": network}))

    own, shared = (load_of(hop, sizes, fabric(per)) for per in ("device", "node"))
    assert (own.network, shared.network) == (1, 4)
    assert own.crossing == shared.crossing == 8
    flat = Context(ring=8)
    flat_hop = load_of(hop, axes.ordered(flat.sizes), fabric("node"))
    assert (flat_hop.network, flat_hop.crossing, flat_hop.all_ranks) == (1, 2, 8)


def test_placement_is_the_transpose_and_some_keep_their_own():
    """P = 64, C = 4: of the team x member grid gcd(3, 15) + 1 ranks are fixed."""
    context = Context.named("startrail(4)", 64)
    placement = Term("placement", "transpose", "cp", 1)
    fabric = fabric_of(Cluster.read("h100-8x8"))
    load = load_of(placement, axes.ordered(context.sizes), fabric)
    assert load.all_ranks == 64 - 4


@pytest.mark.parametrize(("order", "blocks"), [("natural", 160), ("member", 128)])
def test_out_of_node_blocks_by_order_of_ranks(order, blocks):
    """Of the busiest node of 8 at P = 64, C = 4, MHA, forward: two orders of ranks."""
    context = Context.named("startrail(4)", 64)
    sizes = dict(axes.ordered(context.sizes))
    if order == "member":
        # (group, member, index): the ring's axis cut into groups of ring / team ranks.
        sizes |= {"ring_out": 4, "ring_in": 4, "team_out": 4}
        names = [n for n in sizes if n not in ("ring_out", "team_out", "ring_in")]
        sizes = {n: sizes[n] for n in (*names, "ring_out", "team_out", "ring_in")}
    one = Call(1, 1, 1, 1, 1, 1, 2, scalar_bytes=0)
    sent = Counter()
    for term in terms(context, one, back=False):
        for src, dst in pairs(term.pattern, term.axis, tuple(sizes.items())):
            if src // 8 != dst // 8:
                sent[src // 8] += term.times * term.message // one.q_block
    assert max(sent.values()) == blocks


def test_short_blocks_are_slower():
    kernel = Kernel(
        forward="1 TFLOP/s",
        backward="1 TFLOP/s",
        short=((1024, 0.5, 0.4), (4096, 1.0, 0.8)),
        source="x",
    )
    parts = [part_of_rate(kernel, rows) for rows in (512, 1024, 2048, 4096, 9999)]
    assert parts == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert part_of_rate(kernel, 2048, back=True) == pytest.approx(0.6)


def test_rows_of_a_kernel_block():
    call = Call(1, 100, 100, 8, 8, 1, 2)
    assert block_rows(Context(ring=8), call) == 100
    assert block_rows(Context(ulysses=2, ring=4), call) == 200
    assert block_rows(Context(team=2, ring=4, schedule=StarTrail()), call) == 200
    assert block_rows(Context(team=4, ring=2), call) == 100


@given(
    st.sampled_from([Tile(), Tile(team_inner=2, ring_inner=2), StarTrail()]),
    st.booleans(),
    st.floats(1, 100),
)
def test_faster_links_are_never_slower(schedule, back, factor):
    context = Context(team=4, ring=8, schedule=schedule)
    fabric = fabric_of(Cluster.read("a100-8x4"))
    network = fabric.network.model_copy(update={"rate": fabric.network.rate * factor})
    call = Call(1, 4096, 4096, 8, 2, 128, 2)
    kernels = [1e-3] * (2 if isinstance(schedule, StarTrail) else 8)
    sizes = axes.ordered(context.sizes)
    now, then = (
        pass_of(context, call, kernels, each, sizes, back=back).seconds
        for each in (fabric, replace(fabric, network=network))
    )
    assert then <= now


def test_work_is_even_under_zigzag_and_counted_elsewhere():
    tokens = 64
    for context in (
        Context(ring=8),
        Context(team=2, ring=4),
        Context(team=2, ring=4, schedule=StarTrail()),
        Context(ulysses=2, team=2, ring=2),
        Context(ring=8, schedule=DoubleRing(inner=4)),
    ):
        even = step_pairs(context, tokens, CAUSAL)
        written = Context(
            ulysses=context.ulysses,
            team=context.team,
            ring=context.ring,
            schedule=context.schedule,
            layout="zigzag",
        )
        counted = step_pairs(written, tokens, Mask(causal=True, window=tokens))
        assert len(even) == len(counted)
        assert counted == pytest.approx(even, rel=0.2)
        assert max(step_pairs(_contiguous(context), tokens, CAUSAL)) > 1.5 * max(even)


def _contiguous(context):
    fields = {name: getattr(context, name) for name in ("ulysses", "team", "ring", "schedule")}
    return Context(**fields, layout="contiguous")


@pytest.mark.parametrize(("name", "shifts"), [("ring", 7 + 8), ("tile(1)", 7 + 7)])
def test_every_return_of_gradients_is_counted_once(name, shifts):
    """Kernels that take no time leave the hops; the last return hides under nothing."""
    slow = line(8, rate=1e6, latency=0.0)
    context = Context.named(name, 8)
    call = Call(1, 16, 16, 2, 2, 8, 2)
    sizes, fabric = axes.ordered(context.sizes), fabric_of(slow)
    free = pass_of(context, call, [0.0] * 7 + [1e-12], fabric, sizes, back=True)
    assert free.seconds == pytest.approx(shifts * call.kv_block(1) / 1e6, rel=1e-6)
    long = pass_of(context, call, [1.0] * 8, fabric, sizes, back=True)
    assert long.seconds == pytest.approx(8 + call.kv_block(1) / 1e6, rel=1e-6)


def test_a_step_takes_at_least_its_launch():
    call, context = Call(1, 16, 16, 2, 2, 8, 2), Context(ring=4)
    kernel = Kernel(forward=1e12, backward=1e12, launch=0.5, source="test")
    found = kernel_seconds(context, call, kernel, [256.0, 0.0, 256.0], back=False)
    assert found == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)


def walked(fabric, kernel, *, back=False, context=None):
    """(one hop's seconds at 1 MB/s, the pass) of equal steps over four ranks."""
    context = context or Context(ring=4)
    call = Call(1, 16, 16, 2, 2, 8, 2)
    found = pass_of(context, call, [kernel] * 4, fabric, axes.ordered(context.sizes), back=back)
    return call.kv_block(1) / 1e6, found


def test_kernels_lose_part_of_the_messages_beside_them():
    """Three of four kernels have a hop beside them, and the last one nothing."""
    fabric = fabric_of(line(4, rate=1e6, latency=1e-3, displaces=0.75))
    hop, found = walked(fabric, 1.0)
    assert found.seconds == pytest.approx(4 + 3 * 0.75 * hop, rel=1e-9)
    hop, short = walked(fabric, 1e-9)
    assert short.seconds == pytest.approx(3 * (1e-3 + hop), rel=1e-3)
    # Keys go on three times, gradients return three times, the last time beside nothing.
    _, back = walked(fabric, 1.0, back=True)
    assert back.seconds == pytest.approx(4 + 5 * 0.75 * hop + 1e-3 + hop, rel=1e-9)


def test_messages_of_an_interface_displace_nothing():
    fields = cluster(
        nodes=[node(name, "d", 2) for name in "ab"],
        links=[
            link(within="a", rate=1e6, displaces=1),
            link(within="b", rate=1e6, displaces=1),
            link(between=("a", "b"), rate=1e6),
        ],
    )
    within = Context(ring=4, schedule=Tile(ring_inner=2))
    hop, found = walked(fabric_of(fields), 1.0, context=within)
    # Two cycles of two steps: one hop inside each, one between them.
    assert found.seconds == pytest.approx(4 + 2 * hop, rel=1e-9)


@given(
    st.floats(0, 2),
    st.floats(0, 1),
    st.floats(1e-9, 1e-2),
    st.booleans(),
    st.sampled_from([Context(ring=4), Context(team=2, ring=2), Context.named("startrail(2)", 4)]),
)
def test_what_is_displaced_is_time_and_the_interval_holds_it(part, more, kernel, back, context):
    free, some, much = (
        walked(fabric_of(line(4, rate=1e6, displaces=d)), kernel, back=back, context=context)[1]
        for d in (0, part, min(2, part + more))
    )
    slack = 1 + 1e-9
    assert free.seconds <= some.seconds * slack
    assert some.seconds <= much.seconds * slack
    assert some.least <= some.seconds * slack
    assert some.seconds <= some.most * slack
    if part <= 1:
        # Kernels that stand still while messages move take as long as one after the other.
        assert some.most == pytest.approx(free.most)
