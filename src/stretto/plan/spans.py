"""Sets of positions as intervals: what a rank holds, what a query sees, what has to move."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

#: Half-open interval of global positions, or of local rows where it says so.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Spans:
    """A set of positions as sorted, disjoint, non-adjacent, non-empty half-open intervals.

    Any intervals may be given; overlapping and touching ones are joined. A rank stores its
    positions as rows in ascending order: `position` and `before` go from row to position and back.
    """

    spans: tuple[Span, ...] = ()
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _rows: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        spans = joined(self.spans)
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "_starts", tuple(start for start, _ in spans))
        lengths = (end - start for start, end in spans)
        object.__setattr__(self, "_rows", tuple(accumulate(lengths, initial=0)))
        object.__setattr__(self, "_hash", hash(spans))

    def __hash__(self) -> int:
        return self._hash

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


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorted, without empty intervals, touching and overlapping ones joined."""
    found: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)
