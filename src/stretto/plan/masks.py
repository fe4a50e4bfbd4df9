"""Masks as relations between intervals, and their cut into the few shapes that kernels know.

Both ends of the keys that a query sees move forward with the query, by no or one key at a time. So
the visible pairs of any two sets of rows, in local row numbers, are a few strips of rows whose two
ends are straight lines; everything here is read off these strips. The cost depends on the number of
intervals, never on the number of rows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from stretto.errors import ShapeError
from stretto.plan.checks import is_whole
from stretto.plan.spans import Span, Spans, joined

Kind = Literal["full", "causal", "anticausal"]


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
    #: Documents of sets of positions met before: a plan asks for each rank's once per pair.
    _memo: dict[tuple[Spans, int], frozenset[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_whole("window", self.window)
        _check_whole("q_offset", self.q_offset)
        _check_whole("prefix", self.prefix, optional=False)
        for length in self.documents or ():
            _check_whole("documents: length", length, optional=False)
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
        object.__setattr__(self, "_memo", {})

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
        if not (is_whole(q_rows) and is_whole(k_rows) and min(q_rows, k_rows) >= 0):
            raise ShapeError(f"{q_rows!r} queries and {k_rows!r} keys: lengths are ints from 0 on")
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
            # Without an offset these are no queries of other keys, but documents that do not fit.
            keys = tokens if self.q_offset is None else self._bounds[-1]
            self._check_documents(tokens, keys)
            shift = self.offset
        clipped = ((max(a - shift, 0), min(b - shift, tokens)) for a, b in pairwise(self._bounds))
        return tuple((start, end) for start, end in clipped if start < end)

    def documents_of(self, rows: Spans, shift: int = 0) -> frozenset[int]:
        """Numbers, among the non-empty documents, of those that rows moved by `shift` are in."""
        known = self._memo.get((rows, shift))
        if known is None:
            found: set[int] = set()
            for start, end in rows:
                first = bisect_right(self._bounds, start + shift) - 1
                found.update(range(first, bisect_left(self._bounds, end + shift)))
            known = self._memo[rows, shift] = frozenset(found)
        return known

    def _document(self, position: int) -> int:
        """Number of the non-empty document at a position; outside all of them -1 or the end."""
        return bisect_right(self._bounds, position) - 1


def packed(documents: object) -> tuple[int, ...] | None:
    """Lengths of documents from a sequence, an array or a tensor of them; Mask checks the numbers.

    Raises ShapeError for what holds no lengths.
    """
    if documents is None or isinstance(documents, tuple):
        return documents
    listed = documents.tolist() if hasattr(documents, "tolist") else documents
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ShapeError(
            f"documents={documents!r}: expected the lengths of all documents, as (900, 124)"
        )
    return tuple(listed)


def _check_whole(what: str, value: object, *, optional: bool = True) -> None:
    if not (is_whole(value) or (optional and value is None)):
        raise ShapeError(f"{what} {value!r} is a {type(value).__name__}; it counts rows, an int")


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
    return [(rows, keys) for keys, spans in columns.items() for rows in joined(spans)]


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
    for at in sorted(mask.documents_of(q, shift) & mask.documents_of(k)):
        yield mask._bounds[at], mask._bounds[at + 1]


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
