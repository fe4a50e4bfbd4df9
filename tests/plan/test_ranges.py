"""Geometry of attention: every visible pair in exactly one piece, by brute force."""

import random

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from stretto.errors import ConfigError, PlanMismatch, ShapeError
from stretto.plan.ranges import (
    BALANCE,
    FULL,
    LAYOUTS,
    Mask,
    Piece,
    Spans,
    count,
    needed,
    pieces,
    resolve_layout,
    sees,
    shard,
)

CAUSAL = Mask(causal=True)
NAMED = [name for name in LAYOUTS if name != "documents"]


def members(rows):
    return [position for start, end in rows for position in range(start, end)]


def sees_by_hand(mask, query, key):
    """The definition in the words of the architecture, without anything of the module's own."""
    if key < mask.prefix:
        return True
    here = query + (mask.q_offset or 0)
    if mask.documents is not None:
        ends = [sum(mask.documents[: n + 1]) for n in range(len(mask.documents))]
        if next(n for n, end in enumerate(ends) if here < end) != next(
            n for n, end in enumerate(ends) if key < end
        ):
            return False
    if mask.causal and key > here:
        return False
    return mask.window is None or abs(here - key) < mask.window


def visible_by_hand(mask, q, k):
    return sorted((i, j) for i in members(q) for j in members(k) if sees_by_hand(mask, i, j))


def covered(found, q, k):
    """Every pair that the pieces hold, as often as they hold it, in global positions."""
    pairs = []
    for (q_start, q_end), (k_start, k_end), kind in found:
        for row in range(q_start, q_end):
            for key in range(k_start, k_end):
                here, there = row - q_start, key - k_start
                if kind == "full" or (there <= here if kind == "causal" else there >= here):
                    pairs.append((q.position(row), k.position(key)))
    return sorted(pairs)


def assert_exact(mask, q, k, found):
    """Each visible pair once, no other, out of the three shapes only."""
    for piece in found:
        assert piece.q[0] < piece.q[1] <= q.rows
        assert piece.k[0] < piece.k[1] <= k.rows
        assert piece.kind == "full" or piece.q[1] - piece.q[0] == piece.k[1] - piece.k[0]
    assert covered(found, q, k) == visible_by_hand(mask, q, k)


@st.composite
def spans(draw, end=40):
    """A set of positions, some given as overlapping and empty intervals."""
    ends = st.tuples(st.integers(0, end), st.integers(0, end))
    return Spans(tuple(draw(st.lists(ends.map(sorted).map(tuple), max_size=6))))


@st.composite
def lengths(draw, total):
    """Documents, some empty, that sum to a total."""
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=6)))
    return tuple(end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True))


@st.composite
def cases(draw, longest=40):
    """(mask, queries, keys): every kind of mask over self and cross attention."""
    keys = draw(st.integers(1, longest))
    documents = draw(st.none() | lengths(keys))
    offset = draw(st.none() | st.integers(0, keys))
    if documents is None and offset is not None and draw(st.booleans()):
        offset, queries = draw(st.integers(-keys, 2 * keys)), draw(st.integers(0, longest))
    elif offset is not None:
        queries = draw(st.integers(0, keys - offset))
    else:
        queries = keys
    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, longest + 2)),
        q_offset=offset,
        documents=documents,
        prefix=draw(st.sampled_from([0, 0, 0, 1, keys // 2, keys])),
    )
    mask.check(queries, keys)
    return mask, queries, keys


# ---- sets of positions -------------------------------------------------------------------------


@given(spans(), spans())
def test_spans_are_sets(one, other):
    a, b = set(members(one)), set(members(other))
    assert set(members(one | other)) == a | b
    assert set(members(one & other)) == a & b
    assert set(members(one - other)) == a - b
    assert (one == other) == (a == b)
    assert one != other or hash(one) == hash(other)
    for result in (one | other, one & other, one - other):
        assert all(start < end for start, end in result)
        assert all(left < right for (_, left), (right, _) in zip(result, result.spans[1:]))


@given(spans(), spans(), st.integers(0, 45), st.integers(0, 45))
def test_rows_are_positions_in_order(rows, other, start, end):
    listed = members(rows)
    assert rows.rows == len(listed)
    assert [rows.position(row) for row in range(rows.rows)] == listed
    assert [rows.before(p) for p in range(45)] == [sum(m < p for m in listed) for p in range(45)]
    assert [p in rows for p in range(45)] == [p in listed for p in range(45)]
    assert members(rows.take(start, min(end, rows.rows))) == listed[start:end]
    assert rows.take(0, rows.rows) == rows
    assert members(rows.within(start, end)) == [p for p in listed if start <= p < end]
    assert members(rows.locate(other)) == [n for n, p in enumerate(listed) if p in other]


# ---- masks -------------------------------------------------------------------------------------


@given(cases())
def test_the_rule_is_the_definition(case):
    mask, queries, keys = case
    for query in range(queries):
        for key in range(keys):
            assert mask.sees(query, key) == sees_by_hand(mask, query, key)


@settings(max_examples=250)
@given(cases(), spans(), spans())
def test_pieces_cover_each_visible_pair_once(case, some_q, some_k):
    """Any rows against any keys, not only those of a layout."""
    mask, queries, keys = case
    q, k = some_q & Spans(((0, queries),)), some_k & Spans(((0, keys),))
    found = pieces(mask, q, k)
    assert_exact(mask, q, k, found)
    visible = visible_by_hand(mask, q, k)
    assert count(mask, q, k) == len(visible) == sum(piece.pairs for piece in found)
    assert sees(mask, q, k) == bool(visible)
    assert needed(mask, q, k) == Spans(tuple((key, key + 1) for _, key in visible))
    assert list(found) == sorted(found)


@settings(max_examples=60)
@given(cases(longest=150), st.integers(1, 64), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
@example((CAUSAL, 129, 129), 64, "zigzag", "zigzag")
@example((Mask(causal=True, window=5, documents=(0, 70, 1, 0, 58)), 129, 129), 64, "auto", "auto")
def test_shards_cover_the_whole_mask_once(case, parts, q_layout, k_layout):
    """All ranks against all owners, up to 64, uneven lengths and ranks without rows included."""
    mask, queries, keys = case
    assume(mask.documents or "documents" not in (q_layout, k_layout) or queries == keys)
    own, owned = shard(q_layout, queries, parts, mask), shard(k_layout, keys, parts, mask)
    pairs = [pair for q in own for k in owned for pair in covered(pieces(mask, q, k), q, k)]
    whole = Spans(((0, queries),)), Spans(((0, keys),))
    assert sorted(pairs) == visible_by_hand(mask, *whole)
    assert len(pairs) == count(mask, *whole)
    held = [needed(mask, q, k) for q in own for k in owned]
    assert all(bool(need) == sees(mask, q, k) for need, (q, k) in zip(held, product(own, owned)))


def product(own, owned):
    return [(q, k) for q in own for k in owned]


FAULTS = {
    "dropped": lambda found: found[:-1],
    "twice": lambda found: (*found, found[0]),
    "a row longer": lambda found: (found[0]._replace(q=(0, found[0].q[1] + 1)), *found[1:]),
    "another kind": lambda found: (found[0]._replace(kind="full"), *found[1:]),
    "mirrored": lambda found: (found[0]._replace(kind="anticausal"), *found[1:]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_cover_check_fires(fault):
    """The check that the tests above rest on notices a wrong piece of every kind."""
    mask, q = Mask(causal=True, window=3), Spans(((0, 4), (8, 12)))
    found = pieces(mask, q, q)
    assert_exact(mask, q, q, found)
    with pytest.raises(AssertionError):
        assert_exact(mask, q, q, FAULTS[fault](found))


# ---- few pieces --------------------------------------------------------------------------------


def team(shards, number, size):
    own = shards[number * size : (number + 1) * size]
    return Spans(tuple(span for rows in own for span in rows))


@pytest.mark.parametrize("tokens", [96, 101])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zigzag_teams_meet_in_one_piece(tokens, size):
    """Section 2 of the brief: earlier keys, later keys, and the team's own, a piece each."""
    shards = shard("zigzag", tokens, 12, CAUSAL)
    teams = [team(shards, number, size) for number in range(12 // size)]
    kinds = {0: "causal", 1: "full", -1: "full"}
    for t, q in enumerate(teams):
        for owner, k in enumerate(teams):
            (found,) = pieces(CAUSAL, q, k)
            assert found.kind == kinds[(t > owner) - (t < owner)]
    low, high = pieces(CAUSAL, teams[1], teams[0])[0], pieces(CAUSAL, teams[0], teams[1])[0]
    assert low.q == (0, teams[1].rows)
    assert high.k == (0, teams[1].rows)


def test_the_own_step_of_a_tile_has_four_pieces():
    """Team of four, column of member 1: the four of section 5, cut along the other direction."""
    shards = shard("zigzag", 8 * 12 * 4, 12, CAUSAL)
    chunk = shards[5].rows // 2
    found = pieces(CAUSAL, team(shards, 1, 4), shards[5])
    assert found == (
        Piece((chunk, 2 * chunk), (0, chunk), "causal"),
        Piece((2 * chunk, 7 * chunk), (0, chunk), "full"),
        Piece((6 * chunk, 7 * chunk), (chunk, 2 * chunk), "causal"),
        Piece((7 * chunk, 8 * chunk), (0, 2 * chunk), "full"),
    )


def test_a_window_is_two_triangles_for_each_window_of_rows():
    mask = Mask(causal=True, window=8)
    shards = shard("contiguous", 64, 2, mask)
    assert pieces(mask, shards[1], shards[0]) == (Piece((0, 7), (25, 32), "anticausal"),)
    assert pieces(mask, shards[0], shards[0]) == (
        Piece((0, 8), (0, 8), "causal"),
        Piece((8, 15), (1, 8), "anticausal"),
        Piece((8, 16), (8, 16), "causal"),
        Piece((16, 23), (9, 16), "anticausal"),
        Piece((16, 24), (16, 24), "causal"),
        Piece((24, 31), (17, 24), "anticausal"),
        Piece((24, 32), (24, 32), "causal"),
    )


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Mask(causal=True, q_offset=6), [("full", 0, 6), ("causal", 0, 0)]),
        (Mask(causal=True, q_offset=6, prefix=8), [("full", 0, 8), ("causal", 2, 0)]),
        (Mask(q_offset=0), [("full", 0, 16)]),
        (Mask(causal=True, q_offset=6, window=40), [("full", 0, 6), ("causal", 0, 0)]),
    ],
    ids=["prefix of keys", "prefix-LM", "cross", "wide window"],
)
def test_prefixes_and_cross_attention_take_few_pieces(mask, expected):
    """10 queries at positions 6 to 15 among 16 keys."""
    found = pieces(mask, Spans(((0, 10),)), Spans(((0, 16),)))
    assert [piece.kind for piece in found] == [kind for kind, _, _ in expected]
    assert found[0].k == (0, expected[0][2])


def test_a_document_is_one_square_on_its_rank():
    mask = Mask(causal=True, documents=(16, 16, 0, 16, 16))
    shards = shard("documents", 64, 4, mask)
    assert all(pieces(mask, q, q) == (Piece((0, 16), (0, 16), "causal"),) for q in shards)
    assert sum(sees(mask, q, k) for q in shards for k in shards) == 4


# ---- layouts -----------------------------------------------------------------------------------


@given(cases(longest=150), st.integers(1, 64), st.sampled_from(NAMED))
def test_layouts_hold_each_row_once_and_evenly(case, parts, layout):
    mask, _, tokens = case
    names = [layout] if mask.documents is None else [layout, "documents"]
    for shards in (shard(name, tokens, parts, mask) for name in names):
        assert len(shards) == parts
        assert sorted(p for rows in shards for p in members(rows)) == list(range(tokens))
        assert max(s.rows for s in shards) - min(s.rows for s in shards) <= 1


@given(st.integers(0, 300), st.integers(1, 64))
def test_zigzag_pairs_a_front_chunk_with_its_back(tokens, parts):
    """2P chunks in order, sizes equal up to one; rank r owns chunks r and 2P - 1 - r."""
    shards = shard("zigzag", tokens, parts)
    starts = []
    for rank, rows in enumerate(shards):
        front = (rows.rows + 1) // 2
        starts.append((rank, members(rows)[:front]))
        starts.append((2 * parts - 1 - rank, members(rows)[front:]))
    chunks = [chunk for _, chunk in sorted(starts)]
    assert [position for chunk in chunks for position in chunk] == list(range(tokens))
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@pytest.mark.parametrize("parts", [2, 3, 8, 64])
def test_zigzag_balances_every_step(parts):
    """A rank's own step has half a chunk's rows more per chunk row; all others cost the same."""
    half = 4
    shards = shard("zigzag", 2 * parts * half, parts, CAUSAL)
    work = [[count(CAUSAL, q, k) for k in shards] for q in shards]
    for rank, row in enumerate(work):
        own = row.pop(rank)
        assert set(row) == {2 * half * half}
        assert own == 2 * half * half + half
    contiguous = shard("contiguous", 2 * parts * half, parts, CAUSAL)
    everything = Spans(((0, 2 * parts * half),))
    totals = [count(CAUSAL, rows, everything) for rows in contiguous]
    assert max(totals) > 1.4 * sum(totals) / parts


def packed(shortest, longest, tokens, seed):
    """Document lengths, evenly spread on a logarithmic scale."""
    draw = random.Random(seed)
    found = []
    while (left := tokens - sum(found)) > 0:
        length = int(shortest * (longest / shortest) ** draw.random())
        found.append(min(left, length))
    return tuple(found)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("shortest", "longest"),
    [(10, 100), (50, 2000), (500, 8000), (1000, 60000), (5000, 65536), (65536, 65536)],
)
def test_documents_balance_work_and_rows(shortest, longest, causal):
    tokens, parts = 65536, 16
    mask = Mask(causal=causal, documents=packed(shortest, longest, tokens, seed=longest))
    shards = shard("documents", tokens, parts, mask)
    work = [count(mask, rows, Spans(((0, tokens),))) for rows in shards]
    assert max(work) * parts <= BALANCE * sum(work)
    assert {rows.rows for rows in shards} == {tokens // parts}


def test_documents_stay_together_where_they_can():
    """Short documents need few other ranks: fewer pairs of ranks meet than with zigzag."""
    tokens, parts = 65536, 16
    mask = Mask(causal=True, documents=packed(50, 2000, tokens, seed=1))
    meetings = {
        layout: sum(sees(mask, q, k) for q in shards for k in shards)
        for layout in ("documents", "zigzag")
        for shards in [shard(layout, tokens, parts, mask)]
    }
    assert meetings["documents"] <= 3 * parts
    assert meetings["documents"] < meetings["zigzag"]


def test_queries_of_other_keys_are_cut_by_the_same_documents():
    """5 queries at positions 4 to 8 of documents (6, 6): two of them in the first one."""
    mask = Mask(causal=True, documents=(6, 6), q_offset=4)
    assert mask.document_spans(5) == ((0, 2), (2, 5))
    assert mask.document_spans(12) == ((0, 6), (6, 12))


def test_one_document_is_zigzag():
    mask = Mask(causal=True, documents=(100,))
    assert shard("documents", 100, 8, mask) == shard("zigzag", 100, 8)


def test_ranges_written_out():
    layout = (((5, 10), (0, 2)), (), ((2, 5),))
    assert shard(layout, 10, 3) == (Spans(((0, 2), (5, 10))), Spans(), Spans(((2, 5),)))
    for name in ("zigzag", "contiguous"):
        written = tuple(rows.spans for rows in shard(name, 50, 8))
        assert shard(written, 50, 8) == shard(name, 50, 8)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (FULL, "contiguous"),
        (CAUSAL, "zigzag"),
        (Mask(causal=True, window=8), "contiguous"),
        (Mask(causal=True, window=9), "zigzag"),
        (Mask(window=4), "contiguous"),
        (Mask(causal=True, documents=(60, 4)), "documents"),
        (Mask(documents=(60, 4), window=4), "documents"),
    ],
)
def test_auto_follows_the_mask(mask, expected):
    assert resolve_layout("auto", 64, 8, mask) == expected
    assert shard("auto", 64, 8, mask) == shard(expected, 64, 8, mask)
    assert resolve_layout("zigzag", 64, 8, mask) == "zigzag"
    assert resolve_layout((((0, 64),),), 64, 1, mask) == (((0, 64),),)


# ---- cost --------------------------------------------------------------------------------------


def test_the_cost_does_not_depend_on_the_rows():
    """Four thousand pairs of shards of a sequence of 2^40 rows; by rows it would never end."""
    tokens, parts = 1 << 40, 64
    shards = shard("zigzag", tokens, parts, CAUSAL)
    everything = Spans(((0, tokens),))
    assert sum(count(CAUSAL, q, k) for q in shards for k in shards) == tokens * (tokens + 1) // 2
    assert {len(pieces(CAUSAL, q, k)) for q in shards[::8] for k in shards} == {1}
    assert needed(CAUSAL, shards[0], everything) == everything


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_keys_is_refused(window):
    with pytest.raises(ShapeError, match=f"window={window}: .* at least 1"):
        Mask(window=window)


@pytest.mark.parametrize("length", [None, "4", 4.0, True])
def test_lengths_of_documents_are_whole_numbers(length):
    with pytest.raises(ShapeError, match=f"length {length!r} is a .*; it counts rows, an int"):
        Mask(documents=(4, length))


@pytest.mark.parametrize(
    ("documents", "match"),
    [((4, 5), "sum to 9, the sequence has 10"), ((6, 5), "sum to 11"), ((), "sum to 0")],
)
def test_documents_sum_to_the_sequence(documents, match):
    with pytest.raises(ShapeError, match=match):
        Mask(documents=documents).check(10, 10)
    with pytest.raises(ShapeError, match=match):
        shard("documents", 10, 2, Mask(documents=documents))


def test_long_lists_of_documents_are_shortened_in_messages():
    with pytest.raises(ShapeError, match=r"\(1, 1, 1, 1, \.\.\. 94 more \.\.\., 1, 1\)"):
        Mask(documents=(1,) * 100).check(99, 99)


@pytest.mark.parametrize("mask", [CAUSAL, Mask(window=2), Mask(documents=(9,))])
def test_alignment_is_asked_for_when_lengths_differ(mask):
    with pytest.raises(ShapeError, match=r"5 queries and 9 keys, .* pass 0 .* or 4 to align"):
        mask.check(5, 9)
    FULL.check(5, 9)


def test_an_explicit_offset_settles_the_alignment():
    for offset in (0, 4, -2):
        Mask(causal=True, q_offset=offset).check(5, 9)


@pytest.mark.parametrize("offset", [-1, 5])
def test_queries_outside_every_document_are_refused(offset):
    mask = Mask(documents=(4, 5), q_offset=offset)
    with pytest.raises(ShapeError, match="documents end at 9"):
        mask.check(5, 9)


@pytest.mark.parametrize(
    "given", [{"prefix": -1}, {"documents": (3, -1)}], ids=["prefix", "documents"]
)
def test_negative_numbers_are_refused(given):
    with pytest.raises(ShapeError, match="at least 0"):
        Mask(**given)


def test_a_prefix_lies_within_the_keys():
    with pytest.raises(ShapeError, match="prefix=11 exceeds the 10 keys"):
        Mask(prefix=11).check(10, 10)


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ("spiral", "'spiral' is unknown; known are auto, zigzag"),
        ((((0, 10),),), "lists 1 ranks, the axis has 2"),
        ((((0, 5),), ((6, 10),)), "lists 9 rows on 9 positions"),
        ((((0, 6),), ((5, 10),)), "lists 11 rows on 10 positions"),
        ((((0, 5),), ((5, 11),)), "every position from 0 to 9"),
    ],
)
def test_layouts_that_are_no_partition_are_refused(layout, match):
    with pytest.raises(PlanMismatch, match=match):
        shard(layout, 10, 2)


def test_errors_are_of_the_users_kind():
    assert issubclass(ShapeError, ConfigError)
    assert issubclass(ShapeError, ValueError)


@pytest.mark.parametrize("prefix", [1.5, None, True])
def test_a_prefix_counts_keys(prefix):
    with pytest.raises(ShapeError, match=f"prefix {prefix!r} is a .*; it counts rows, an int"):
        Mask(prefix=prefix)
