"""Back ends of attention behind one contract: full rectangles and equal-length causal squares.

    L rows   B batch   H query heads   G key/value heads, H a multiple of G   D head dim
    n equal pieces in one call   r rows of a piece

Storage is rows outermost, (L, B, H, D) and contiguous, so any range of rows is one run of bytes.
Kernels get the view (n, B * H, r, D): batch entries become further heads, because head b * H + h
then reads key head b * G + h // (H / G), which is what grouped-query kernels do anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from stretto.ops.attention import aten
from stretto.ops.attention.merge import accumulators, merge_
from stretto.ops.attention.naive import wide_dtype

if TYPE_CHECKING:
    from stretto.plan.ranges import Piece

Kind = Literal["full", "causal", "anticausal"]
Gradients = tuple[Tensor, Tensor, Tensor]

_HALF = (torch.bfloat16, torch.float16)
_ALL = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A pair of kernels (`aten.py` says what they take and return) and where they run."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="cpu",
            forward=aten.cpu_forward,
            backward=aten.cpu_backward,
            devices=("cpu",),
            dtypes=_ALL,
        ),
        Backend(
            name="naive",
            forward=aten.naive_forward,
            backward=aten.naive_backward,
            devices=("cpu", "cuda"),
            dtypes=_ALL,
        ),
    )
}


def choose(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, backend: str = "auto"
) -> Backend:
    """The back end of that name, or for "auto" the fastest that takes these tensors."""
    device = torch.device(device)
    if backend != "auto":
        return BACKENDS[backend]
    return BACKENDS["cpu" if device.type == "cpu" else "naive"]


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Attention of one piece, in storage order.

    q is (Lq, B, H, D), k and v are (Lk, B, G, D). "full" shows every key; "causal" and
    "anticausal" need Lq == Lk, where row i sees keys 0..i, or i..Lk - 1, itself included.
    Returns out (Lq, B, H, D) in q's dtype and lse (Lq, B, H) in float32 (float64 for float64),
    contiguous. No keys: out 0, lse -inf. Empty inputs reach no kernel.
    """
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide_dtype(q.dtype))
        return q.new_zeros(q.shape), lse
    out, lse = _forward(_Batch.whole(q, k, kind), q, k, v, scale, backend)
    return out.view(q.shape), lse.view(q.shape[:-1])


@torch.no_grad()
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kind: Kind,
    scale: float,
    backend: Backend,
) -> Gradients:
    """Gradients of one piece, in storage order and the inputs' dtypes.

    dout and out are (Lq, B, H, D), lse is (Lq, B, H). `lse` and `out` are those of the whole
    sequence for q's rows, so that dq is what these keys contribute and dk, dv are what these rows
    do. Only rowsum(dout * out) is used of `out`: a `surrogate` serves as well.
    """
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    whole = _Batch.whole(q, k, kind)
    dq, dk, dv = _backward(whole, dout, q, k, v, out, lse, scale, backend)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@torch.no_grad()
def attend_(
    acc: Tensor,
    acc_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    scale: float,
    backend: Backend,
) -> None:
    """Merge the attention of q over k and v, as `pieces` of their rows, into the accumulators.

    acc (Lq, B, H, D) and acc_lse (Lq, B, H) come from `merge.accumulators` and belong to q's rows.
    Equal pieces on disjoint rows run as one call; the order of calls depends on `pieces` alone.
    """
    for batch in _batches(pieces):
        outs, lses = _forward(batch, q, k, v, scale, backend)
        for rows, out, lse in zip(batch.q_slices(), outs, lses, strict=True):
            into, into_lse = acc[rows], acc_lse[rows]
            merge_(into, into_lse, out.view(into.shape), lse.view(into_lse.shape))


@torch.no_grad()
def attend_backward_(
    sums: Gradients,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Sequence[Piece],
    scale: float,
    backend: Backend,
) -> None:
    """Add the gradients of `pieces` to `sums` (dq, dk, dv), in place.

    The sums have the shapes of q, k and v and any floating dtype; float32 (float64 for float64)
    keeps long sums exact. `out` and `lse` as for `backward`.
    """
    for batch in _batches(pieces):
        parts = _backward(batch, dout, q, k, v, out, lse, scale, backend)
        places = batch.q_slices(), batch.k_slices(), batch.k_slices()
        for total, part, slices in zip(sums, parts, places, strict=True):
            for rows, piece in zip(slices, part, strict=True):
                into = total[rows]
                into.add_(piece.view(into.shape))


def attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Attention of q over k and v when these are all keys: out in q's dtype, and lse.

    One piece that covers all of q goes from the kernel to the caller as it is.
    """
    if len(pieces) == 1 and tuple(pieces[0].q) == (0, len(q)):
        begin, end = pieces[0].k
        return forward(q, k[begin:end], v[begin:end], pieces[0].kind, scale, backend)
    acc, acc_lse = accumulators(q)
    attend_(acc, acc_lse, q, k, v, pieces, scale, backend)
    return acc.to(q.dtype), acc_lse


@torch.no_grad()
def delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out) over the head dim: (L, B, H, D) to (L, B, H), float32 or float64."""
    wide = wide_dtype(out.dtype)
    return (dout.to(wide) * out.to(wide)).sum(-1)


@torch.no_grad()
def surrogate(dout: Tensor, delta: Tensor, like: Tensor | None = None) -> Tensor:
    """A stand-in for `out` in backward: rowsum(dout * surrogate) = delta, and no longer than out.

    Kernels take `out` only to form delta, so a rank that holds dout and delta of other ranks' rows
    needs no `out` of theirs. Row by row dout * delta / |dout|^2, with |dout| taken after division
    by its largest entry, so that neither 1e-30 nor 1e4 leaves the range; 0 where dout is 0.
    dout is (L, B, H, D), delta (L, B, H).
    Returns dout's dtype, laid out as `like` (dout unless given): cuDNN's backward is silently wrong
    when out is laid out otherwise than its forward lays it out.
    """
    result = torch.empty_like(dout if like is None else like)
    if result.numel() == 0:
        return result
    wide = dout.to(wide_dtype(dout.dtype))
    peak = wide.abs().amax(-1, keepdim=True)
    peak = peak.masked_fill_(peak == 0, 1.0)
    unit = wide / peak
    length = unit.square().sum(-1, keepdim=True)
    length = length.masked_fill_(length == 0, 1.0)
    return result.copy_(unit * (delta[..., None] / peak / length))


class _Batch(NamedTuple):
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
    def whole(cls, q: Tensor, k: Tensor, kind: Kind) -> _Batch:
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
        width = x[0].numel()
        shape = (self.count, rows, x.shape[1] * x.shape[2], *x.shape[3:])
        inner = x.shape[3:].numel()
        strides = (step * width, width, inner, *([1] if x.ndim == 4 else []))
        view = x.as_strided(shape, strides, x.storage_offset() + start * width)
        return view.flip(1) if self.kind == "anticausal" else view

    def restored(self, x: Tensor) -> Tensor:
        """A kernel's (n, heads, rows, ...) as contiguous (n, rows, heads, ...), in true order."""
        x = x.transpose(1, 2)
        return x.flip(1) if self.kind == "anticausal" else x.contiguous()


def _batches(pieces: Sequence[Piece]) -> list[_Batch]:
    """`pieces` without the empty ones, equal pieces on disjoint rows of q and of k together."""
    starts: dict[tuple[Kind, int, int], list[tuple[int, int]]] = {}
    for piece in pieces:
        (q_begin, q_end), (k_begin, k_end) = piece.q, piece.k
        if q_end > q_begin and k_end > k_begin:
            key = (piece.kind, q_end - q_begin, k_end - k_begin)
            starts.setdefault(key, []).append((q_begin, k_begin))
    return [
        _Batch(kind, len(run), run[0][0], q_step, q_rows, run[0][1], k_step, k_rows)
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


def _forward(
    batch: _Batch, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """out (n, r, B * H, D) and lse (n, r, B * H) of a batch of pieces, contiguous."""
    views = batch.q_view(q), batch.k_view(k), batch.k_view(v)
    causal = batch.kind != "full"
    assert not causal or batch.q_rows == batch.k_rows, f"{batch.kind} piece is not square: {batch}"
    out, lse = backend.forward(*(x.transpose(1, 2) for x in views), causal, scale)
    return batch.restored(out), batch.restored(lse)


def _backward(
    batch: _Batch,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: Backend,
) -> Gradients:
    """dq (n, r, B * H, D), dk and dv (n, s, B * G, D) of a batch of pieces, contiguous."""
    views = batch.q_view(dout), batch.q_view(q), batch.k_view(k), batch.k_view(v)
    # Dense, as the forward kernel's output is, whatever lies between the pieces.
    dense_out = batch.q_view(out).contiguous()
    heads = (x.transpose(1, 2) for x in (*views, dense_out))
    dense_lse = batch.q_view(lse).transpose(1, 2).contiguous()
    gradients = backend.backward(*heads, dense_lse, batch.kind != "full", scale)
    dq, dk, dv = (batch.restored(x) for x in gradients)
    return dq, dk, dv
