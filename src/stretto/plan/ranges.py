"""Which rows a rank holds and which keys its queries see, as intervals of positions.

Three parts. `Spans` is a set of positions, stored by a rank as rows in ascending order. `Mask` says
which keys a query sees; `pieces` cuts that into the few shapes that kernels know, `needed` and
`count` answer for traffic and work. `shard` gives every rank its rows. All of it is exact integer
arithmetic whose cost depends on the number of intervals, never on the number of rows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapreplace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from stretto.errors import PlanMismatch, ShapeError

#: Half-open interval of global positions, or of local rows where it says so.
Span = tuple[int, int]
#: A named layout, or the ranges of every rank written out.
Layout = str | tuple[tuple[Span, ...], ...]
Kind = Literal["full", "causal", "anticausal"]

LAYOUTS = ("auto", "zigzag", "contiguous", "documents")
#: A layout for packed documents stops cutting shorter documents once the busiest rank has at most
#: this multiple of the mean work: each document cut over all ranks is traffic, 5 % of work is not.
BALANCE = 1.05


@dataclass(frozen=True, slots=True)
class Spans:
    """A set of positions as sorted, disjoint, non-adjacent, non-empty half-open intervals.

    Any intervals may be given; overlapping and touching ones are joined. A rank stores its
    positions as rows in ascending order: `position` and `before` go from row to position and back.
    """

    spans: tuple[Span, ...] = ()
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _rows: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        spans = _joined(self.spans)
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "_starts", tuple(start for start, _ in spans))
        lengths = (end - start for start, end in spans)
        object.__setattr__(self, "_rows", tuple(accumulate(lengths, initial=0)))

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def __contains__(self, position: int) -> bool:
        return self.before(position + 1) > self.before(position)

    def __and__(self, other: Spans) -> Spans:
        few, many = sorted((self, other), key=lambda s: len(s.spans))
        return Spans(tuple(part for start, end in few for part in many.within(start, end)))

    def __or__(self, other: Spans) -> Spans:
        return Spans(self.spans + other.spans)

    def __sub__(self, other: Spans) -> Spans:
        left = []
        for start, end in self:
            for cut_start, cut_end in other.within(start, end):
                left.append((start, cut_start))
                start = cut_end
            left.append((start, end))
        return Spans(tuple(left))

    @property
    def rows(self) -> int:
        """Number of positions."""
        return self._rows[-1]

    @property
    def hull(self) -> Span:
        """First position and one past the last; (0, 0) when empty."""
        return (self.spans[0][0], self.spans[-1][1]) if self.spans else (0, 0)

    def before(self, position: int) -> int:
        """Number of members at smaller positions: the row of `position` if it is a member."""
        at = bisect_right(self._starts, position) - 1
        if at < 0:
            return 0
        start, end = self.spans[at]
        return self._rows[at] + min(position, end) - start

    def position(self, row: int) -> int:
        """Global position of a local row, 0 <= row < rows."""
        assert 0 <= row < self.rows, f"row {row} of {self.rows}"
        at = bisect_right(self._rows, row) - 1
        return self._starts[at] + row - self._rows[at]

    def within(self, start: int, end: int) -> Iterator[Span]:
        """The parts of the intervals that lie in [start, end), in order."""
        for at in range(max(bisect_right(self._starts, start) - 1, 0), len(self.spans)):
            low, high = self.spans[at]
            if low >= end:
                return
            if high > start:
                yield max(low, start), min(high, end)

    def take(self, start: int, end: int) -> Spans:
        """The positions of local rows [start, end)."""
        if end <= start:
            return Spans()
        return Spans(tuple(self.within(self.position(start), self.position(end - 1) + 1)))

    def locate(self, other: Spans) -> Spans:
        """The local rows, as intervals of row numbers, at which the members of `other` are."""
        return Spans(tuple((self.before(start), self.before(end)) for start, end in self & other))


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorted, without empty intervals, touching and overlapping ones joined."""
    joined: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees, as a rule on positions.

    The query of row position i stands at p = i + q_offset on the axis of keys and sees key j when
    both lie in the same document, and causal: j <= p, and window: p - j < window (not causal: also
    j - p < window). Keys j < prefix are seen by every query, whatever else holds.

    `q_offset` None means 0 and is refused by `check` where queries and keys differ in number and
    the mask depends on their alignment; an explicit 0 aligns the first query with the first key,
    keys - queries aligns the last two. `documents`: lengths, zeros allowed, that sum to the keys.
    Raises ShapeError.
    """

    causal: bool = False
    window: int | None = None
    q_offset: int | None = None
    documents: tuple[int, ...] | None = None
    prefix: int = 0
    _bounds: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ShapeError(
                f"window={self.window}: a window counts the keys that a query sees, itself "
                "included, and is at least 1; use window=None for no window"
            )
        if self.prefix < 0:
            raise ShapeError(f"prefix={self.prefix}: it counts keys and is at least 0")
        lengths = self.documents or ()
        if min(lengths, default=0) < 0:
            raise ShapeError(f"documents={_brief(lengths)}: lengths are at least 0")
        bounds = accumulate((length for length in lengths if length), initial=0)
        object.__setattr__(self, "_bounds", tuple(bounds))

    @property
    def offset(self) -> int:
        """Position of the first query on the axis of keys."""
        return self.q_offset or 0

    @property
    def behind(self) -> int | None:
        """How many keys before itself a query sees at most; None without limit."""
        return None if self.window is None else self.window - 1

    @property
    def ahead(self) -> int | None:
        """How many keys after itself a query sees at most; None without limit."""
        return 0 if self.causal else self.behind

    @property
    def aligned(self) -> bool:
        """Whether the mask depends on where queries stand among the keys."""
        return self.causal or self.window is not None or self.documents is not None

    def check(self, q_rows: int, k_rows: int) -> None:
        """Raise ShapeError unless the mask fits sequences of these total lengths."""
        if self.aligned and self.q_offset is None and q_rows != k_rows:
            raise ShapeError(
                f"{q_rows} queries and {k_rows} keys, but no q_offset: query i stands at position "
                f"i + q_offset among the keys; pass 0 to align the first ones or "
                f"{k_rows - q_rows} to align the last ones"
            )
        if self.prefix > k_rows:
            raise ShapeError(f"prefix={self.prefix} exceeds the {k_rows} keys")
        if self.documents is not None:
            self._check_documents(q_rows, k_rows)

    def _check_documents(self, q_rows: int, k_rows: int) -> None:
        total = self._bounds[-1]
        if total != k_rows:
            raise ShapeError(
                f"documents={_brief(self.documents or ())} sum to {total}, the sequence has "
                f"{k_rows} keys; give the length of every document, the padded end included"
            )
        if q_rows and not 0 <= self.offset <= self.offset + q_rows <= total:
            raise ShapeError(
                f"queries stand at {self.offset} to {self.offset + q_rows - 1}, documents end at "
                f"{total}: a query outside every document has no meaning; change q_offset"
            )

    def sees(self, query: int, key: int) -> bool:
        """Whether the query of row position `query` sees `key`: the definition, pair by pair."""
        if key < self.prefix:
            return True
        here = query + self.offset
        if self.documents is not None and self._document(here) != self._document(key):
            return False
        if self.ahead is not None and key - here > self.ahead:
            return False
        return self.behind is None or here - key <= self.behind

    def document_spans(self, tokens: int) -> tuple[Span, ...]:
        """Non-empty documents as intervals of `tokens` rows; one of all rows without documents.

        With another number of tokens than the documents hold, the rows are queries at `q_offset`.
        """
        if self.documents is None:
            return ((0, tokens),) if tokens else ()
        shift = 0
        if tokens != self._bounds[-1]:
            self.check(tokens, self._bounds[-1])
            shift = self.offset
        clipped = ((max(a - shift, 0), min(b - shift, tokens)) for a, b in pairwise(self._bounds))
        return tuple((start, end) for start, end in clipped if start < end)

    def _document(self, position: int) -> int:
        """Number of the non-empty document at a position; outside all of them -1 or the end."""
        return bisect_right(self._bounds, position) - 1


#: Every query sees every key.
FULL = Mask()


def _brief(lengths: tuple[int, ...]) -> str:
    """Lengths for a message, the middle of long lists left out."""
    if len(lengths) <= 8:
        return str(tuple(lengths))
    head, tail = ", ".join(map(str, lengths[:4])), ", ".join(map(str, lengths[-2:]))
    return f"({head}, ... {len(lengths) - 6} more ..., {tail})"


class Piece(NamedTuple):
    """Local rows of queries against local rows of keys, in one of three shapes.

    full: every row sees every key. causal: equal lengths, row i sees keys 0..i. anticausal: equal
    lengths, row i sees keys i..n-1; with the rows of q and k reversed it is a causal square. Both
    squares include their diagonal: a strict one is given as the inclusive one a row smaller.
    """

    q: Span
    k: Span
    kind: Kind

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        rows, keys = self.q[1] - self.q[0], self.k[1] - self.k[0]
        return rows * keys if self.kind == "full" else rows * (rows + 1) // 2


class _Strip(NamedTuple):
    """Consecutive local rows; row t of them sees local keys low + t*rise to high + t*climb - 1."""

    row: int
    rows: int
    low: int
    rise: int
    high: int
    climb: int


def sees(mask: Mask, q: Spans, k: Spans) -> bool:
    """Whether any query in `q` sees any key in `k`."""
    return any(True for _ in _strips(mask, q, k))


def needed(mask: Mask, q: Spans, k: Spans) -> Spans:
    """The keys in `k` that at least one query in `q` sees, as global positions."""
    rows = Spans(
        tuple(
            (strip.low, strip.high + strip.climb * (strip.rows - 1))
            for strip in _strips(mask, q, k)
        )
    )
    if rows.rows == k.rows:
        return k
    return Spans(tuple(span for start, end in rows for span in k.take(start, end)))


def count(mask: Mask, q: Spans, k: Spans) -> int:
    """Number of visible (query, key) pairs, in closed form."""
    return sum(
        s.rows * (s.high - s.low) + (s.climb - s.rise) * (s.rows * (s.rows - 1) // 2)
        for s in _strips(mask, q, k)
    )


def pieces(mask: Mask, q: Spans, k: Spans) -> tuple[Piece, ...]:
    """The visible pairs of `q` and `k`, each in exactly one piece, in order of rows, then keys.

    Rows are local: row i of `q` is its i-th smallest position. Zigzag teams give one or two
    pieces, a window gives two for each `window` rows.
    """
    found = [piece for strip in _strips(mask, q, k) for piece in _cut(strip)]
    return tuple(sorted(_merged(found)))


def _cut(strip: _Strip) -> Iterator[Piece]:
    """One strip as pieces; a band is cut every so many rows as it is wide."""
    width = strip.high - strip.low
    if not strip.rise:
        yield from _slab(strip)
        return
    if not strip.climb:
        rows, low = (strip.row, strip.row + strip.rows), strip.low
        yield from _square(rows, (low, low + strip.rows), "anticausal")
        yield from _full(rows, (low + strip.rows, strip.high))
        return
    for done in range(0, strip.rows, width):
        rows = min(width, strip.rows - done)
        yield from _parallelogram(strip.row + done, rows, strip.low + done, strip.high + done)


def _slab(strip: _Strip) -> Iterator[Piece]:
    """A strip whose first key is the same in all rows."""
    rows = (strip.row, strip.row + strip.rows)
    if not strip.climb:
        yield from _full(rows, (strip.low, strip.high))
        return
    diagonal = strip.high - 1
    yield from _full(rows, (strip.low, diagonal))
    yield from _square(rows, (diagonal, diagonal + strip.rows), "causal")


def _parallelogram(row: int, rows: int, low: int, high: int) -> Iterator[Piece]:
    """Rows no more than keys in a row, both ends moving: triangle, rectangle, triangle."""
    diagonal = high - 1
    # With as many rows as keys the last row's window starts on the diagonal: one row fewer.
    edge = min(rows, diagonal - low)
    yield from _square((row, row + edge), (low, low + edge), "anticausal")
    yield from _full((row, row + rows), (low + edge, diagonal))
    yield from _square((row, row + rows), (diagonal, diagonal + rows), "causal")


def _square(q: Span, k: Span, kind: Kind) -> Iterator[Piece]:
    if q[1] - q[0] > 1:
        yield Piece(q, k, kind)
    else:
        yield from _full(q, k)


def _full(q: Span, k: Span) -> Iterator[Piece]:
    if q[0] < q[1] and k[0] < k[1]:
        yield Piece(q, k, "full")


def _merged(found: list[Piece]) -> list[Piece]:
    """Rectangles that share a whole edge joined, first those above each other."""
    kept = [piece for piece in found if piece.kind != "full"]
    rectangles = [(piece.q, piece.k) for piece in found if piece.kind == "full"]
    by_rows = _stacked(rectangles)
    across = _stacked([(k, q) for q, k in by_rows])
    return kept + [Piece(q, k, "full") for q, k in _stacked([(q, k) for k, q in across])]


def _stacked(rectangles: list[tuple[Span, Span]]) -> list[tuple[Span, Span]]:
    """Rectangles with equal second sides and touching first sides joined."""
    columns: dict[Span, list[Span]] = {}
    for rows, keys in rectangles:
        columns.setdefault(keys, []).append(rows)
    return [(rows, keys) for keys, spans in columns.items() for rows in _joined(spans)]


def _strips(mask: Mask, q: Spans, k: Spans) -> Iterator[_Strip]:
    """The visible region of `q` and `k` as non-empty strips of rows, as long as they can be."""
    prefixed = k.before(mask.prefix)
    if q and prefixed:
        yield _Strip(0, q.rows, 0, 0, prefixed, 0)
    now: _Strip | None = None
    for strip in _linear_parts(mask, q, k):
        longer = now and _extended(now, strip)
        if now and not longer:
            yield now
        now = longer or strip
    if now:
        yield now


def _extended(strip: _Strip, after: _Strip) -> _Strip | None:
    """Both as one strip, or None where one of the two ends does not go on in a line."""
    if after.row != strip.row + strip.rows:
        return None
    rise = _slope(strip.rows, strip.low, strip.rise, after.rows, after.low, after.rise)
    climb = _slope(strip.rows, strip.high, strip.climb, after.rows, after.high, after.climb)
    if rise is None or climb is None:
        return None
    return _Strip(strip.row, strip.rows + after.rows, strip.low, rise, strip.high, climb)


def _slope(rows: int, value: int, slope: int, more: int, next_value: int, next_slope: int):
    """The slope, 0 or 1, of the line through both ends; None if there is none.

    A single row has a point and no slope of its own.
    """
    step = next_value - (value + slope * (rows - 1))
    fits = step in (0, 1) and (rows == 1 or slope == step) and (more == 1 or next_slope == step)
    return step if fits else None


def _linear_parts(mask: Mask, q: Spans, k: Spans) -> Iterator[_Strip]:
    """Strips between neighbouring positions at which either end of a query's keys may turn."""
    for document in _shared_documents(mask, q, k):
        keys = max(document[0], mask.prefix, k.hull[0]), min(document[1], k.hull[1])
        if keys[0] >= keys[1]:
            continue
        for start, end in q.within(*_watchers(mask, document, keys)):
            row, first, last = q.before(start), start + mask.offset, end + mask.offset
            for here, there in pairwise(_turns(mask, first, last, keys, k)):
                strip = _strip_at(mask, row + here - first, here, there, keys, k)
                if strip.low < strip.high:
                    yield strip


def _shared_documents(mask: Mask, q: Spans, k: Spans) -> Iterator[Span]:
    """Documents with both a query of `q` and a key of `k`; without documents, one of all."""
    if not q or not k:
        return
    shift = mask.offset
    if mask.documents is None:
        yield min(q.hull[0] + shift, k.hull[0]), max(q.hull[1] + shift, k.hull[1])
        return
    for at in sorted(_held(mask._bounds, q, shift) & _held(mask._bounds, k, 0)):
        yield mask._bounds[at], mask._bounds[at + 1]


def _held(bounds: tuple[int, ...], rows: Spans, shift: int) -> set[int]:
    """Numbers of the documents, between bounds, that positions shifted by `shift` fall into."""
    held: set[int] = set()
    for start, end in rows:
        held.update(
            range(bisect_right(bounds, start + shift) - 1, bisect_left(bounds, end + shift))
        )
    return held


def _watchers(mask: Mask, document: Span, keys: Span) -> Span:
    """Row positions of the queries of a document that may see keys of an interval."""
    start, end = document
    if mask.ahead is not None:
        start = max(start, keys[0] - mask.ahead)
    if mask.behind is not None:
        end = min(end, keys[1] + mask.behind)
    return start - mask.offset, end - mask.offset


def _turns(mask: Mask, first: int, last: int, keys: Span, k: Spans) -> list[int]:
    """Query positions from first to last between which the local key ends move in lines.

    An end turns where it passes the border of an interval of `k`. Both the query whose end lies
    on the border and the next start a new part; parts that go on in a line are joined later.
    """
    seen = _visible(mask, first, keys)[0], _visible(mask, last - 1, keys)[1]
    if _local(mask, first, keys, k) == _local(mask, last - 1, keys, k):
        # Both ends only ever move forward, so every query in between sees the same keys.
        return [first, last]
    borders = {*keys}.union(*k.within(*seen))
    turns = {first, last}
    if mask.ahead is not None:
        turns.update(border - mask.ahead - 1 for border in borders)
        turns.update(border - mask.ahead for border in borders)
    if mask.behind is not None:
        turns.update(border + mask.behind for border in borders)
        turns.update(border + mask.behind + 1 for border in borders)
    return sorted(turn for turn in turns if first <= turn <= last)


def _visible(mask: Mask, position: int, keys: Span) -> Span:
    """The keys, out of an interval of one document, that the query at a position sees."""
    low = keys[0] if mask.behind is None else max(keys[0], position - mask.behind)
    high = keys[1] if mask.ahead is None else min(keys[1], position + mask.ahead + 1)
    return low, high


def _local(mask: Mask, position: int, keys: Span, k: Spans) -> Span:
    """The same as local rows of `k`."""
    low, high = _visible(mask, position, keys)
    return k.before(low), k.before(high)


def _strip_at(mask: Mask, row: int, here: int, there: int, keys: Span, k: Spans) -> _Strip:
    """The queries at [here, there), between two turns, as a strip of local rows and keys."""
    low, high = _local(mask, here, keys, k)
    if there - here == 1:
        return _Strip(row, 1, low, 0, high, 0)
    last_low, last_high = _local(mask, there - 1, keys, k)
    steps = there - here - 1
    rise, climb = last_low - low, last_high - high
    assert {rise, climb} <= {0, steps}, "an end of the keys turned between two turns"
    return _Strip(row, there - here, low, rise // steps, high, climb // steps)


def resolve_layout(layout: Layout, tokens: int, parts: int, mask: Mask = FULL) -> Layout:
    """The layout that "auto" stands for; any other one as it is.

    Packed documents: documents. Causal: zigzag, unless the window is shorter than a shard, where
    the work is even already. Otherwise contiguous. Raises PlanMismatch for an unknown name.
    """
    if not isinstance(layout, str):
        return layout
    if layout not in LAYOUTS:
        raise PlanMismatch(
            f"layout {layout!r} is unknown; known are {', '.join(LAYOUTS)}, or the ranges of "
            "every rank written out"
        )
    if layout != "auto":
        return layout
    if mask.documents is not None:
        return "documents"
    narrow = mask.window is not None and mask.window * parts <= tokens
    return "zigzag" if mask.causal and not narrow else "contiguous"


def shard(layout: Layout, tokens: int, parts: int, mask: Mask = FULL) -> tuple[Spans, ...]:
    """The positions of every rank, by logical index; together each of [0, tokens) once.

    zigzag: 2*parts chunks that differ by at most one row, rank r owns chunks r and
    2*parts-1-r. contiguous: chunks in order. documents: long documents in zigzag over all ranks,
    the others in order, so that rows and visible pairs are even; see `_documents`. All three give
    ranks row numbers that differ by at most one. Ranks without rows are legal.
    Raises PlanMismatch for an unknown layout or ranges that are not a partition, ShapeError for
    documents that do not fit.
    """
    assert parts >= 1, f"{parts} parts"
    assert tokens >= 0, f"{tokens} tokens"
    layout = resolve_layout(layout, tokens, parts, mask)
    if not isinstance(layout, str):
        return _explicit(layout, tokens, parts)
    if layout == "zigzag":
        return _zigzag(Spans(((0, tokens),)), parts)
    if layout == "contiguous":
        return _contiguous(Spans(((0, tokens),)), parts)
    return _documents(tokens, parts, mask)


def _explicit(layout: tuple[tuple[Span, ...], ...], tokens: int, parts: int) -> tuple[Spans, ...]:
    if len(layout) != parts:
        raise PlanMismatch(f"the layout lists {len(layout)} ranks, the axis has {parts}")
    shards = tuple(Spans(tuple(ranges)) for ranges in layout)
    whole = Spans(tuple(span for own in shards for span in own))
    listed = sum(end - start for ranges in layout for start, end in ranges)
    if whole != Spans(((0, tokens),)) or listed != tokens:
        raise PlanMismatch(
            f"the layout lists {listed} rows on {whole.rows} positions in {whole.hull}; every "
            f"position from 0 to {tokens - 1} must be listed exactly once"
        )
    return shards


def _deal(rows: int, parts: int, turn: int = 0) -> list[int]:
    """Rows for each rank, equal up to one; the surplus goes to ranks turn, turn + 1, ..."""
    each, surplus = divmod(rows, parts)
    return [each + ((rank - turn) % parts < surplus) for rank in range(parts)]


def _contiguous(rows: Spans, parts: int, turn: int = 0) -> tuple[Spans, ...]:
    """The positions of `rows` in order, cut into one run for each rank."""
    ends = accumulate(_deal(rows.rows, parts, turn), initial=0)
    return tuple(rows.take(start, end) for start, end in pairwise(ends))


def _zigzag(rows: Spans, parts: int, turn: int = 0) -> tuple[Spans, ...]:
    """Two runs for each rank: number r from the front and number r from the back."""
    dealt = _deal(rows.rows, parts, turn)
    fronts = list(accumulate(((n + 1) // 2 for n in dealt), initial=0))
    backs = [rows.rows - done for done in accumulate((n // 2 for n in dealt), initial=0)]
    return tuple(
        rows.take(fronts[rank], fronts[rank + 1]) | rows.take(backs[rank + 1], backs[rank])
        for rank in range(parts)
    )


def _documents(tokens: int, parts: int, mask: Mask) -> tuple[Spans, ...]:
    """Packed documents: even rows, nearly even work, and most documents whole on one rank.

    In order, like contiguous, if the work is even then. Otherwise documents longer than a threshold
    are cut in zigzag over all ranks, which makes their work even, and the others go whole to the
    least loaded rank, longest first; the thresholds tried are shard, shard / 2, shard / 4, ... The
    first attempt at which no rank has more than BALANCE times the mean work is taken, or the best
    if there is none.
    """
    best: tuple[float, tuple[Spans, ...]] | None = None
    for shards, work in _attempts(mask.document_spans(tokens), tokens, parts, mask):
        excess = max(work) * parts / max(sum(work), 1)
        if best is None or excess < best[0]:
            best = excess, shards
        if excess <= BALANCE:
            break
    assert best is not None
    return best[1]


def _attempts(
    documents: tuple[Span, ...], tokens: int, parts: int, mask: Mask
) -> Iterator[tuple[tuple[Spans, ...], list[float]]]:
    """Shards and their work, the least traffic first."""
    lengths = tuple(end - start for start, end in documents)
    packed = replace(mask, q_offset=None, documents=lengths, prefix=0)
    whole = Spans(documents)
    in_order = _contiguous(whole, parts)
    yield in_order, [float(count(packed, rows, whole)) for rows in in_order]
    alone = replace(packed, documents=None)
    for threshold in _thresholds(tokens, parts):
        yield _placed(documents, threshold, parts, alone)


def _thresholds(tokens: int, parts: int) -> Iterator[int]:
    """A shard and its halves, as long as zigzag chunks of such a document have rows."""
    threshold = -(-tokens // parts)
    yield threshold
    while (threshold := threshold // 2) >= 2 * parts:
        yield threshold


def _placed(
    documents: tuple[Span, ...], threshold: int, parts: int, alone: Mask
) -> tuple[tuple[Spans, ...], list[float]]:
    """Shards with documents above the threshold in zigzag, and the work of each shard.

    `alone` is the mask inside one document. The work of a zigzagged document counts as even: it
    is, up to a row of each chunk.
    """
    own: list[list[Span]] = [[] for _ in range(parts)]
    turn, even = 0, 0
    for start, end in documents:
        if end - start > threshold:
            for rank, rows in enumerate(_zigzag(Spans(((start, end),)), parts, turn)):
                own[rank].extend(rows)
            turn += end - start
            even += _work(alone, (start, end), (start, end))
    whole = [span for span in documents if span[1] - span[0] <= threshold]
    room = _deal(sum(end - start for start, end in whole), parts, turn)
    given = _whole(whole, room, alone)
    work = [even / parts + sum(_work(alone, *part) for part in held) for held in given]
    for rank, held in enumerate(given):
        own[rank].extend(rows for rows, _ in held)
    return tuple(Spans(tuple(spans)) for spans in own), work


def _whole(documents: list[Span], room: list[int], alone: Mask) -> list[list[tuple[Span, Span]]]:
    """(rows, their document) for each rank: documents to the least loaded rank, longest first.

    Load is the larger of a rank's shares of rows and of work. Ranks then hold `room` rows each:
    the last rows of the shortest documents move from those above to those below.
    """
    longest = sorted(documents, key=lambda span: (span[0] - span[1], span[0]))
    rows_all = max(sum(room), 1)
    work_of = {n: _work(alone, (0, n), (0, n)) for n in {end - start for start, end in documents}}
    work_all = max(sum(work_of[end - start] for start, end in documents), 1)
    given: list[list[tuple[Span, Span]]] = [[] for _ in room]
    heap = [(0.0, rank, 0, 0) for rank in range(len(room))]
    for start, end in longest:
        _, rank, rows, work = heap[0]
        rows, work = rows + end - start, work + work_of[end - start]
        heapreplace(heap, (max(rows / rows_all, work / work_all), rank, rows, work))
        given[rank].append(((start, end), (start, end)))
    _level(given, room)
    return given


def _level(given: list[list[tuple[Span, Span]]], room: list[int]) -> None:
    """Move rows, in place, from ranks with more than their room to those with less."""
    spare: list[tuple[Span, Span]] = []
    short = []
    for rank, parts in enumerate(given):
        excess = sum(end - start for (start, end), _ in parts) - room[rank]
        if excess < 0:
            short.append((rank, -excess))
        while excess > 0:
            (start, end), document = parts.pop()
            cut = max(start, end - excess)
            spare.append(((cut, end), document))
            if start < cut:
                parts.append(((start, cut), document))
            excess -= end - cut
    for rank, missing in short:
        while missing:
            (start, end), document = spare.pop()
            cut = min(end, start + missing)
            given[rank].append(((start, cut), document))
            if cut < end:
                spare.append(((cut, end), document))
            missing -= cut - start


def _work(alone: Mask, rows: Span, document: Span) -> int:
    """Visible pairs of some rows of a document."""
    return count(alone, Spans((rows,)), Spans((document,)))
