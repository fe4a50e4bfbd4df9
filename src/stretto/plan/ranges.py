"""Which rows of a sequence each rank holds: the shard layouts, by logical index.

The geometry of attention in one import: sets of positions (`Spans`), masks and their pieces, and
the layouts. All of it is exact integer arithmetic without a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from heapq import heapreplace
from itertools import accumulate, pairwise
from typing import NamedTuple

from stretto.errors import PlanMismatch
from stretto.plan.masks import FULL, Kind, Mask, Piece, count, needed, packed, pieces, sees
from stretto.plan.spans import Span, Spans

__all__ = [
    "FULL",
    "LAYOUTS",
    "Kind",
    "Layout",
    "Mask",
    "Piece",
    "Span",
    "Spans",
    "count",
    "needed",
    "packed",
    "pieces",
    "resolve_layout",
    "sees",
    "shard",
]

#: A named layout, or the ranges of every rank written out.
Layout = str | tuple[tuple[Span, ...], ...]

LAYOUTS = ("auto", "zigzag", "contiguous", "documents")
#: A layout of packed documents is even enough when the busiest rank has at most this multiple of
#: the mean work: finer cuts are more traffic and smaller pieces, 5 % of work is neither.
BALANCE = 1.05
#: Largest share of a document, as a fraction of a rank's rows and work, in the order tried.
FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


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
    2*parts-1-r. contiguous: chunks in order. documents: shares of
    documents, so that rows and visible pairs are even and most documents stay on few ranks. All
    three give ranks row numbers that differ by at most one. Ranks without rows are legal.
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


def _deal(rows: int, parts: int) -> list[int]:
    """Rows for each rank, equal up to one; the first ranks take the surplus."""
    each, surplus = divmod(rows, parts)
    return [each + (rank < surplus) for rank in range(parts)]


def _contiguous(rows: Spans, parts: int) -> tuple[Spans, ...]:
    """The positions of `rows` in order, cut into one run for each rank."""
    ends = accumulate(_deal(rows.rows, parts), initial=0)
    return tuple(rows.take(start, end) for start, end in pairwise(ends))


def _zigzag(rows: Spans, parts: int) -> tuple[Spans, ...]:
    """Two runs for each rank: number r from the front and number r from the back."""
    dealt = _deal(rows.rows, parts)
    fronts = list(accumulate(((n + 1) // 2 for n in dealt), initial=0))
    backs = [rows.rows - done for done in accumulate((n // 2 for n in dealt), initial=0)]
    return tuple(
        rows.take(fronts[rank], fronts[rank + 1]) | rows.take(backs[rank + 1], backs[rank])
        for rank in range(parts)
    )


class _Share(NamedTuple):
    """Rows of a document, with their parts of all rows and, as a zigzag share, of all work."""

    load: float
    rows: float
    work: float
    spans: tuple[Span, ...]
    document: Span


#: Rows on a rank and the document they are from.
_Held = tuple[Span, Span]


def _documents(tokens: int, parts: int, mask: Mask) -> tuple[Spans, ...]:
    """Packed documents: even rows, nearly even work, and most documents on few ranks.

    In order, like contiguous, if the work is even then. Otherwise every document is cut in zigzag
    into equal shares, as few as keep a share below a fraction of a rank's rows and of its work,
    and shares go to the least loaded rank, largest first. The first of these attempts at which no
    rank has more than BALANCE times the mean work is taken, or the best if there is none.
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
) -> Iterator[tuple[tuple[Spans, ...], list[int]]]:
    """Shards and their work, the least traffic first."""
    lengths = tuple(end - start for start, end in documents)
    packed = replace(mask, q_offset=None, documents=lengths, prefix=0)
    whole = Spans(documents)
    in_order = _contiguous(whole, parts)
    yield in_order, [count(packed, rows, whole) for rows in in_order]
    alone = replace(packed, documents=None)
    pairs = {n: _pairs(alone, (0, n), (0, n)) for n in set(lengths)}
    for fraction in FRACTIONS:
        held = _given(_shares(documents, parts / fraction, parts, pairs), parts)
        _level(held, _deal(tokens, parts))
        shards = tuple(Spans(tuple(rows for rows, _ in own)) for own in held)
        yield shards, [sum(_work(alone, *part, pairs) for part in own) for own in held]


def _shares(
    documents: tuple[Span, ...], per_load: float, parts: int, pairs: dict[int, int]
) -> list[_Share]:
    """Documents cut into `per_load` shares for all of the load there is, but at least one each.

    `pairs`: work of a document by length. Load is the larger part, of all rows or of all work.
    """
    lengths = [end - start for start, end in documents]
    all_rows, all_pairs = sum(lengths), max(sum(pairs[n] for n in lengths), 1)
    shares = []
    for document, length in zip(documents, lengths, strict=True):
        rows, work = length / all_rows, pairs[length] / all_pairs
        number = min(max(math.ceil(max(rows, work) * per_load - 1e-9), 1), parts)
        rows, work = rows / number, work / number
        shares += [
            _Share(max(rows, work), rows, work, own.spans, document)
            for own in _zigzag(Spans((document,)), number)
        ]
    return shares


def _given(shares: list[_Share], parts: int) -> list[list[_Held]]:
    """Every share to the rank with the least load, the largest first."""
    held: list[list[_Held]] = [[] for _ in range(parts)]
    heap = [(0.0, rank, 0.0, 0.0) for rank in range(parts)]
    for share in sorted(shares, key=lambda share: (-share.load, share.spans)):
        _, rank, rows, work = heap[0]
        rows, work = rows + share.rows, work + share.work
        heapreplace(heap, (max(rows, work), rank, rows, work))
        held[rank] += [(span, share.document) for span in share.spans]
    return held


def _level(held: list[list[_Held]], room: list[int]) -> None:
    """Make ranks hold `room` rows each, in place: the smallest shares move, last rows first."""
    spare: list[_Held] = []
    short = []
    for rank, own in enumerate(held):
        excess = sum(end - start for (start, end), _ in own) - room[rank]
        if excess < 0:
            short.append((rank, -excess))
        while excess > 0:
            (start, end), document = own.pop()
            cut = max(start, end - excess)
            spare.append(((cut, end), document))
            if start < cut:
                own.append(((start, cut), document))
            excess -= end - cut
    for rank, missing in short:
        while missing:
            (start, end), document = spare.pop()
            cut = min(end, start + missing)
            held[rank].append(((start, cut), document))
            if cut < end:
                spare.append(((cut, end), document))
            missing -= cut - start


def _work(alone: Mask, rows: Span, document: Span, pairs: dict[int, int]) -> int:
    """Visible pairs of some rows of a document; whole documents are looked up."""
    whole = pairs[document[1] - document[0]]
    return whole if rows == document else _pairs(alone, rows, document)


def _pairs(alone: Mask, rows: Span, document: Span) -> int:
    """Visible pairs of some rows of a document."""
    return count(alone, Spans((rows,)), Spans((document,)))
