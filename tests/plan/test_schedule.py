"""Schedules: every visible pair once, bytes by closed formula, both ends of a message agree."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.plan import moves
from stretto.plan.checks import divisors
from stretto.plan.context import (
    AttentionCase,
    Context,
    DoubleRing,
    Gather,
    Ring,
    StarTrail,
    Tile,
    named_points,
)
from stretto.plan.ranges import FULL, Mask, Spans, count
from stretto.plan.schedule import build_schedule, schedule

CAUSAL = Mask(causal=True)
HEADS = 64


def case_of(context, tokens=None, mask=FULL, heads=(HEADS, HEADS), **more):
    tokens = 4 * context.degree if tokens is None else tokens
    return AttentionCase.of(context, tokens=tokens, heads=heads, head_dim=8, mask=mask, **more)


def schedules(context, case):
    return [schedule(context, case.at(rank)) for rank in range(context.degree)]


# ---- exact cover ---------------------------------------------------------------------------------


@st.composite
def contexts(draw):
    """Any schedule on up to 64 ranks, with its levels and everything it may be told."""
    ranks = draw(st.integers(1, 64))
    kind = draw(st.sampled_from(["tile", "ring", "double-ring", "gather", "startrail"]))
    u = draw(st.sampled_from(divisors(ranks)))
    rest = ranks // u
    if kind == "startrail":
        team = draw(st.sampled_from([c for c in divisors(rest) if rest % (c * c) == 0]))
        circulate = draw(st.sampled_from(["q", "kv"]))
        option = StarTrail(circulate=circulate)
    elif kind == "tile":
        team = draw(st.sampled_from(divisors(rest)))
        inner = draw(st.sampled_from(divisors(team))), draw(st.sampled_from(divisors(rest // team)))
        option = Tile(team_inner=inner[0], ring_inner=inner[1], prune=draw(st.booleans()))
    else:
        team = 1
        inner = draw(st.sampled_from(divisors(rest)))
        option = {
            "ring": Ring(circulate=draw(st.sampled_from(["q", "kv"])), prune=draw(st.booleans())),
            "double-ring": DoubleRing(inner=inner),
            "gather": Gather(),
        }[kind]
    return Context(ulysses=u, team=team, ring=rest // team, schedule=option)


@st.composite
def masks(draw, tokens):
    window = draw(st.none() | st.integers(1, tokens + 1))
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    lengths = tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True))
    documents = draw(st.sampled_from([None, lengths]))
    return Mask(causal=draw(st.booleans()), window=window, documents=documents)


def pairs_of(rows_q, rows_k, pieces):
    """(query, key) positions of pieces, one by one."""
    for piece in pieces:
        for i in range(*piece.q):
            for j in range(*piece.k):
                along, across = i - piece.q[0], j - piece.k[0]
                seen = {"full": True, "causal": across <= along, "anticausal": across >= along}
                if seen[piece.kind]:
                    yield rows_q.position(i), rows_k.position(j)


@settings(max_examples=40)
@given(data=st.data(), context=contexts(), tokens=st.integers(0, 40))
def test_each_visible_pair_is_computed_once_and_no_other(data, context, tokens):
    mask = data.draw(masks(tokens))
    case = case_of(context, tokens, mask, heads=(context.ulysses, context.ulysses))
    found = Counter()
    for plan in schedules(context, case):
        if plan.case.rank % context.ulysses == 0:
            for step in plan.forward.steps:
                found.update(pairs_of(plan.team_q, step.rows, step.pieces))
    visible = {(i, j) for i in range(tokens) for j in range(tokens) if mask.sees(i, j)}
    assert found == Counter(visible)


@settings(max_examples=40)
@given(data=st.data(), context=contexts(), tokens=st.integers(0, 300))
def test_backward_computes_as_many_pairs(data, context, tokens):
    mask = data.draw(masks(tokens))
    case = case_of(context, tokens, mask, heads=(context.ulysses, context.ulysses))
    plans = schedules(context, case)
    whole = Spans(((0, tokens),))
    expected = context.ulysses * count(mask, whole, whole)
    assert sum(plan.pair_count() for plan in plans) == expected
    assert sum(step.pairs for plan in plans for step in plan.backward.steps) == expected


@settings(max_examples=40)
@given(data=st.data(), context=contexts(), tokens=st.integers(0, 120))
def test_what_one_rank_sends_another_expects(data, context, tokens):
    """Move by move: the same axis, phase and rows at both ends."""
    from stretto import axes

    mask = data.draw(masks(tokens))
    case = case_of(context, tokens, mask, heads=(context.ulysses, context.ulysses))
    sizes = axes.ordered(context.sizes)
    at = [axes.position(rank, "cp", sizes) for rank in range(context.degree)]
    moves = [list(schedule(context, case.at(at[rank])).moves()) for rank in range(context.degree)]
    for rank, own in enumerate(moves):
        for number, move in enumerate(own):
            peers = axes.peers(rank, move.axis, sizes)
            here = peers.index(rank)
            for peer, rows in move.sends.items():
                other = moves[peers[peer]][number]
                assert (other.phase, other.axis, other.channel) == (
                    move.phase,
                    move.axis,
                    move.channel,
                )
                assert other.receives[here] == rows


# ---- closed forms --------------------------------------------------------------------------------

PHASES = {
    "forward": ("heads", "row-q", "column", "row-out", "heads-out"),
    "backward": ("back-heads", "back-row", "back-column", "back-owner", "back-row-out"),
}


def blocks(context, case, name, rank=0):
    """Bytes sent, split into blocks of queries and R scalars."""
    plan = schedule(context, case.at(rank))
    block = plan.block_bytes()
    rows = case.q_rows[0].rows
    scalars = 0
    for move in plan.moves((name,)):
        stats = len({"lse", "delta"} & set(move.tensors))
        heads = case.heads_q // context.ulysses
        sent = sum(part.rows for part in move.sends.values())
        scalars += stats * sent * heads * case.batch * case.stat_bytes
    total = plan.traffic((name,)).total()
    unit = case.batch * rows * case.heads_q * case.stat_bytes
    return (total - scalars) / block, scalars / unit


def general(context, g):
    """(forward, backward) of the general tiling in blocks, and in R."""
    u, a, b = context.ulysses, context.team, context.ring
    heads = (2 + 2 * g) * (u - 1) / u
    forward = heads + 2 * (a - 1) + 2 * g * (b - 1)
    backward = heads + 3 * (a - 1) + 4 * g * (b - 1)
    return (forward, a - 1), (backward, (u - 1) / u + 2 * (a - 1))


@pytest.mark.parametrize("groups", [64, 16, 4, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 64])
def test_blocks_of_the_general_tiling(ranks, groups):
    for u in divisors(ranks):
        for a in divisors(ranks // u):
            for inner in {1, min(2, a)}:
                tile = Tile(team_inner=inner, prune=False)
                context = Context(ulysses=u, team=a, ring=ranks // (u * a), schedule=tile)
                g = max(u, groups) / HEADS
                case = case_of(context, heads=(HEADS, groups), mask=CAUSAL)
                forward, backward = general(context, g)
                assert blocks(context, case, "forward") == pytest.approx(forward)
                assert blocks(context, case, "backward") == pytest.approx(backward)


@pytest.mark.parametrize("groups", [64, 16])
def test_blocks_of_startrail(groups):
    g = groups / HEADS
    for ranks, c in [(4, 2), (8, 2), (16, 2), (16, 4), (18, 3), (64, 2), (64, 4), (64, 8)]:
        sub = ranks // c**2
        for circulate, moved in (("q", 2 * c * (sub - 1)), ("kv", 2 * g * c * (sub - 1))):
            context = Context(team=c, ring=ranks // c, schedule=StarTrail(circulate=circulate))
            case = case_of(context, heads=(HEADS, groups), mask=CAUSAL)
            forward = 2 * (c - 1) + 2 * g * (ranks / c + c - 1)
            ride = (c if circulate == "q" else 2 * g * c) * sub * (sub > 1)
            backward = (3 + 4 * g) * (c - 1) + 4 * g * c + moved + ride
            scalars = 2 * (c - 1) + (2 * c * (sub - 1) if circulate == "q" else 0)
            # Rank 1 moves its placement; gcd(c - 1, ring - 1) + 1 ranks keep theirs.
            assert blocks(context, case, "forward", 1) == pytest.approx((forward, c - 1))
            assert blocks(context, case, "backward", 1) == pytest.approx((backward, scalars))


def test_ranks_that_keep_their_placement():
    """gcd(C - 1, T - 1) + 1 of them, whose team's keys are already theirs."""
    context = Context.named("startrail(4)", 64)
    stay = 0
    for plan in schedules(context, case_of(context)):
        (move,) = (move for move in plan.forward.before if move.phase == "placement")
        stay += not move.sends
    assert stay == 4


@pytest.mark.parametrize(("wire", "weight"), [("input", 1), ("float32", 2)])
def test_blocks_of_rings(wire, weight):
    ranks = 8
    ride = Context(ring=ranks, schedule=Ring(gradients="ride", grad_wire=wire, prune=False))
    moving = Context(ring=ranks, schedule=Ring(circulate="q"))
    gather = Context(ring=ranks, schedule=Gather())
    case = case_of(ride)
    expected = 2 * (ranks - 1) + 2 * ranks * weight
    assert blocks(ride, case, "backward") == pytest.approx((expected, 0))
    queries = 2 * (ranks - 1) + ranks, 2 * (ranks - 1)
    assert blocks(moving, case, "backward") == pytest.approx(queries)
    assert blocks(gather, case, "forward") == pytest.approx((2 * (ranks - 1), 0))
    assert blocks(gather, case, "backward") == pytest.approx((4 * (ranks - 1), 0))


def test_bytes_across_nodes():
    """2(a_out - 1) + 2g(b_out - 1) forward, 3(a_out - 1) + 4g(b_out - 1) backward, less kept."""
    for keep, less in (("none", 0), ("far", 2 * 3), ("all", 2 * 3)):
        tile = Tile(team_inner=2, ring_inner=2, keep=keep, prune=False)
        context = Context(team=6, ring=8, schedule=tile)
        plan = schedule(context, case_of(context))
        scalar = case_of(context).stat_bytes / (8 * 2)
        for name, expected in (
            ("forward", 2 * 2 + 2 * 3 + 2 * scalar),
            ("backward", 3 * 2 + 4 * 3 - less + 4 * scalar),
        ):
            traffic = plan.traffic((name,))
            out = traffic.total(axis="team_out") + traffic.total(axis="ring_out")
            assert out / plan.block_bytes() == pytest.approx(expected)


def test_statistics_travel_home_when_asked_for():
    context = Context(ulysses=4)
    case = case_of(context, return_lse=True)
    assert blocks(context, case, "forward") == pytest.approx((4 * 3 / 4, 3 / 4))
    assert blocks(context, case_of(context), "forward") == pytest.approx((4 * 3 / 4, 0))


def test_headline_numbers_of_64_ranks():
    """Forward, multi-head: ring 126; StarTrail 68, 44, 44; tile 28; with Ulysses 11.5."""
    names = ("ring", "startrail(2)", "startrail(4)", "startrail(8)", "tile(8)")
    sent = []
    for name in (*names, "ulysses(8) x tile(2)"):
        context = Context.named(name, 64)
        sent.append(blocks(context, case_of(context), "forward", 1)[0])
    assert sent == pytest.approx([126, 68, 44, 44, 28, 11.5])


# ---- shape of the work ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "startrail(2)", "startrail(4)", "ulysses(2) x tile(4)"])
def test_zigzag_gives_every_rank_the_same_work_in_every_step(name):
    context = Context.named(name, 16)
    plans = schedules(context, case_of(context, 16 * 32, CAUSAL))
    for steps in zip(*(plan.forward.steps for plan in plans), strict=True):
        own = [step.pairs for step in steps]
        # The squares of the own team hold their diagonals: half a row more for every row.
        assert max(own) <= min(own) * (1 + 1 / 16)
    counts = [plan.pair_count() for plan in plans]
    assert max(counts) <= min(counts) * (1 + 1 / 64)


def test_the_own_team_step_of_the_tile_has_four_pieces():
    context = Context(team=4, ring=2)
    plan = schedule(context, case_of(context, 8 * 32, CAUSAL).at(1))
    kinds = Counter(piece.kind for piece in next(plan.forward.steps).pieces)
    assert kinds == {"causal": 2, "full": 2}


def test_pruned_blocks_stop_where_nobody_sees_them():
    """Zigzag descends: on average three quarters. Under a window blocks ascend, one hop each."""
    pruned, whole = Context(ring=16), Context(ring=16, schedule=Tile(prune=False))
    case = case_of(pruned, 16 * 8, CAUSAL)
    sent = [
        sum(plan.traffic(("forward",)).total() for plan in schedules(context, case))
        for context in (pruned, whole)
    ]
    assert 4 * sent[0] == 3 * sent[1]
    window = case_of(pruned, 16 * 8, Mask(causal=True, window=5))
    for plan in schedules(pruned, window):
        hops = [move for move in plan.forward.moves() if move.sends and move.sent]
        assert len(hops) == (plan.case.rank < 15)


def test_counting_bytes_cuts_no_pieces(monkeypatch):
    """Of a ring of 1000 ranks a million pairs of blocks would be cut, for nothing."""
    context = Context(ring=4)
    done = build_schedule(context, case_of(context, 4 * 8, Mask(causal=True)))
    monkeypatch.setattr(moves, "pieces", lambda *_: pytest.fail("pieces were cut"))
    assert done.traffic().total() > 0
    assert done.peak_blocks() > 0
    monkeypatch.undo()
    first = next(done.forward.steps)
    assert first.pieces
    assert first.pieces is first.pieces


def test_explain_says_what_goes_where():
    context = Context(ulysses=8, team=2, ring=4)
    text = schedule(context, case_of(context, 64 * 100)).explain()
    assert "cp64(ring4 x team2 x ulysses8, tile, auto), rank 0 of 64" in text
    assert "column          shift      ring" in text
    assert "= 6 blocks in 3 message(s)" in text
    assert "= 2.625 blocks in 7 message(s)" in text


def test_queries_and_keys_of_other_rows_travel_apart():
    context = Context(ulysses=2)
    together = schedule(context, AttentionCase.of(context, tokens=8, heads=(2, 2), head_dim=4))
    assert [move.tensors for move in together.forward.before] == [("q", "k", "v")]
    assert [move.tensors for move in together.backward.after] == [("dq", "dk", "dv")]
    sizes = {"tokens": 8, "kv_tokens": 12, "heads": (2, 2), "head_dim": 4}
    apart = schedule(context, AttentionCase.of(context, **sizes))
    assert [move.tensors for move in apart.forward.before] == [("q",), ("k", "v")]
    assert [move.tensors for move in apart.backward.after] == [("dq",), ("dk", "dv")]


def test_peaks_of_the_brief():
    """Multi-head, bfloat16, blocks: forward tile 4 16, ring 7, StarTrail 4 28; backward 6a + 14."""

    def peak(context, name):
        return schedule(context, case_of(context)).peak_blocks((name,))

    assert peak(Context(team=4, ring=4), "forward") == 16
    assert peak(Context(ring=16), "forward") == 7
    assert peak(Context.named("startrail(4)", 32), "forward") >= 28
    assert peak(Context(team=4, ring=4), "backward") == 6 * 4 + 14


def test_wire_is_the_traffic_of_the_asked_rank():
    context = Context(team=2, ring=2)
    case = case_of(context, 37, CAUSAL)
    for rank in range(4):
        assert context.wire(case.at(rank)) == schedule(context, case.at(rank)).traffic()
    forward = context.wire(case, ("forward",))
    assert forward + context.wire(case, ("backward",)) == context.wire(case)


@pytest.mark.slow
def test_all_named_points_cover_at_64_ranks():
    whole = Spans(((0, 1000),))
    for context in named_points(64, 64, 64).values():
        plans = schedules(context, case_of(context, 1000, CAUSAL))
        assert sum(plan.pair_count() for plan in plans) == context.ulysses * count(
            CAUSAL, whole, whole
        )
