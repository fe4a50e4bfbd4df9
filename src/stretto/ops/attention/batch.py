"""Equal pieces of attention as one call: views of the storage, without a copy.

L rows   B batch   H heads   D head dim   n equal pieces   r rows of a piece
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stretto.plan.ranges import Kind, Piece


class Batch(NamedTuple):
    """Equal pieces at equal distances: piece i starts at row q_start + i * q_step, and so for k."""

    kind: Kind
    count: int
    q_start: int
    q_step: int
    q_rows: int
    k_start: int
    k_step: int
    k_rows: int

    @classmethod
    def whole(cls, q: Tensor, k: Tensor, kind: Kind) -> Batch:
        return cls(kind, 1, 0, len(q), len(q), 0, len(k), len(k))

    def q_slices(self) -> list[slice]:
        starts = (self.q_start + i * self.q_step for i in range(self.count))
        return [slice(start, start + self.q_rows) for start in starts]

    def k_slices(self) -> list[slice]:
        starts = (self.k_start + i * self.k_step for i in range(self.count))
        return [slice(start, start + self.k_rows) for start in starts]

    def q_view(self, x: Tensor) -> Tensor:
        return self._view(x, self.q_start, self.q_step, self.q_rows)

    def k_view(self, x: Tensor) -> Tensor:
        return self._view(x, self.k_start, self.k_step, self.k_rows)

    def _view(self, x: Tensor, start: int, step: int, rows: int) -> Tensor:
        """(L, B, H, ...) as (n, rows, B * H, ...), in reverse order of rows if anticausal."""
        assert x.is_contiguous(), f"storage is rows outermost, not {x.shape} by {x.stride()}"
        # A view past the end would read a neighbour's rows without an error.
        assert 0 <= start <= len(x) - (self.count - 1) * step - rows, f"{self} of {len(x)} rows"
        heads, inner = x.shape[1] * x.shape[2], x.shape[3:].numel()
        width = heads * inner
        shape = (self.count, rows, heads, *x.shape[3:])
        strides = (step * width, width, inner, *([1] if x.ndim == 4 else []))
        return self._turned(x.as_strided(shape, strides, x.storage_offset() + start * width))

    def statistics(self, x: Tensor) -> Tensor:
        """(L, B, H) as kernels take it, (n, B * H, rows) and contiguous.

        Of one piece it may have any strides: what a kernel gave costs no copy.
        """
        if self.count == 1:
            rows = x[self.q_start : self.q_start + self.q_rows].flatten(1)[None]
            return self._turned(rows).transpose(1, 2).contiguous()
        return self.q_view(x).transpose(1, 2).contiguous()

    def restored(self, x: Tensor) -> Tensor:
        """A view of a kernel's (n, heads, rows, ...) as (n, rows, heads, ...), in true order."""
        return self._turned(x.transpose(1, 2))

    def _turned(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.kind == "anticausal" else x


def batches(pieces: Sequence[Piece]) -> list[Batch]:
    """`pieces` without the empty ones, equal pieces on disjoint rows of q and of k together."""
    starts: dict[tuple[Kind, int, int], list[tuple[int, int]]] = {}
    for piece in pieces:
        (q_begin, q_end), (k_begin, k_end) = piece.q, piece.k
        if q_end > q_begin and k_end > k_begin:
            key = (piece.kind, q_end - q_begin, k_end - k_begin)
            starts.setdefault(key, []).append((q_begin, k_begin))
    return [
        Batch(kind, len(run), run[0][0], q_step, q_rows, run[0][1], k_step, k_rows)
        for (kind, q_rows, k_rows), begins in starts.items()
        for run, q_step, k_step in _runs(sorted(begins), q_rows, k_rows)
    ]


def _runs(
    begins: list[tuple[int, int]], q_rows: int, k_rows: int
) -> list[tuple[list[tuple[int, int]], int, int]]:
    """Sorted starts cut into runs of one distance in q and one in k, none with overlap."""
    runs: list[tuple[list[tuple[int, int]], int, int]] = []
    for begin in begins:
        if runs:
            run, q_step, k_step = runs[-1]
            step = (begin[0] - run[-1][0], begin[1] - run[-1][1])
            apart = step[0] >= q_rows and step[1] >= k_rows
            if apart and (len(run) == 1 or step == (q_step, k_step)):
                runs[-1] = ([*run, begin], *step)
                continue
        runs.append(([begin], q_rows, k_rows))
    return runs
