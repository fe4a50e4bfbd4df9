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

import torch
from torch import Tensor
from torch.nn import functional

from stretto.errors import ConfigError, ShapeError
from stretto.ops.attention import aten
from stretto.ops.attention.batch import Batch, batches
from stretto.ops.attention.merge import accumulators, merge_
from stretto.ops.attention.naive import wide_dtype
from stretto.plan.ranges import Kind, Piece

Gradients = tuple[Tensor, Tensor, Tensor]

_HALF = (torch.bfloat16, torch.float16)
_ALL = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A pair of kernels, as `aten.py` describes them, and what they take.

    Head dims up to `head_limit` are padded with zeros to a multiple of `head_multiple`.
    `capability` is the least CUDA compute capability.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_multiple: int = 1
    head_limit: int | None = None
    capability: tuple[int, int] = (0, 0)
    repeatable: bool = True

    def takes(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        return (
            device.type in self.devices
            and dtype in self.dtypes
            and (self.head_limit is None or head_dim <= self.head_limit)
            and (device.type != "cuda" or _capability(device) >= self.capability)
        )

    def limits(self) -> str:
        dtypes = ", ".join(_name(dtype) for dtype in self.dtypes)
        head = f", head dim <= {self.head_limit}" if self.head_limit else ""
        least = ".".join(map(str, self.capability))
        capability = f", compute capability >= {least}" if any(self.capability) else ""
        return f"{' or '.join(self.devices)}, {dtypes}{head}{capability}"


#: By preference. cuDNN runs at 660 and 552 TFLOP/s forward and backward where flash runs at
#: 350 and 305 (H200, torch 2.11, bfloat16, head dim 128).
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
            name="cudnn",
            forward=aten.cudnn_forward,
            backward=aten.cudnn_backward,
            devices=("cuda",),
            dtypes=_HALF,
            head_multiple=8,
            head_limit=128,
            capability=(9, 0),
            repeatable=False,
        ),
        Backend(
            name="flash",
            forward=aten.flash_forward,
            backward=aten.flash_backward,
            devices=("cuda",),
            dtypes=_HALF,
            head_multiple=8,
            head_limit=256,
            capability=(8, 0),
        ),
        Backend(
            name="efficient",
            forward=aten.efficient_forward,
            backward=aten.efficient_backward,
            devices=("cuda",),
            dtypes=(*_HALF, torch.float32),
            head_multiple=8,
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
    device: torch.device | str, dtype: torch.dtype, head_dim: int, backend: str | Backend = "auto"
) -> Backend:
    """The back end of that name, or for "auto" the fastest that takes these tensors.

    A back end of the caller's own is taken as it is.
    Under `torch.use_deterministic_algorithms` auto passes over back ends that do not repeat.
    Raises ConfigError for an unknown name, ShapeError for tensors that it does not take.
    """
    if isinstance(backend, Backend):
        return backend
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(
            f"no attention back end is called {backend!r}; there are auto, {', '.join(BACKENDS)}"
        )
    device = torch.device(device)
    repeat = backend == "auto" and torch.are_deterministic_algorithms_enabled()
    for found in BACKENDS.values() if backend == "auto" else (BACKENDS[backend],):
        if (found.repeatable or not repeat) and found.takes(device, dtype, head_dim):
            return found
    able = [b for b in BACKENDS.values() if b.takes(device, dtype, head_dim)]
    asked = f"{_name(dtype)} with head dim {head_dim} on {device.type}"
    if not able:
        limits = "; ".join(f"{b.name}: {b.limits()}" for b in BACKENDS.values())
        raise ShapeError(f"no attention back end takes {asked}\n  why: they take {limits}")
    raise ShapeError(
        f"back end {backend} does not take {asked}\n  why: it takes {BACKENDS[backend].limits()}\n"
        f"  to fix: choose auto or one of: {', '.join(b.name for b in able)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Attention of one piece, in storage order.

    q is (Lq, B, H, D), k and v are (Lk, B, G, D). "full" shows every key; "causal" and
    "anticausal" need Lq == Lk, where row i sees keys 0..i, or i..Lk - 1, itself included.
    Returns out (Lq, B, H, D) in q's dtype, contiguous, and lse (Lq, B, H) in float32 (float64 for
    float64), a view of what the kernel wrote. No keys: out 0, lse -inf. Empty inputs reach no
    kernel.
    """
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide_dtype(q.dtype))
        return q.new_zeros(q.shape), lse
    out, lse = _forward(Batch.whole(q, k, kind), q, k, v, scale, backend)
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

    dout and out are (Lq, B, H, D), lse is (Lq, B, H) of any strides. `lse` and `out` are those of
    the whole sequence for q's rows, so that dq is what these keys contribute and dk, dv are what
    these rows do. Only rowsum(dout * out) is used of `out`: a `surrogate` serves as well.
    """
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    whole = Batch.whole(q, k, kind)
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
    for batch in batches(pieces):
        outs, lses = _forward(batch, q, k, v, scale, backend)
        for rows, out, lse in zip(batch.q_slices(), outs, lses.contiguous(), strict=True):
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
    *,
    begun: tuple[bool, bool, bool] = (True, True, True),
) -> None:
    """Add the gradients of `pieces` to `sums` (dq, dk, dv), in place.

    The sums have the shapes of q, k and v and any floating dtype; float32 (float64 for float64)
    keeps long sums exact. Those not `begun` are memory that holds anything, and are set. `out` and
    `lse` as for `backward`.
    """
    for batch in batches(pieces):
        parts = _backward(batch, dout, q, k, v, out, lse, scale, backend)
        places = batch.q_slices(), batch.k_slices(), batch.k_slices()
        for total, part, slices, is_begun in zip(sums, parts, places, begun, strict=True):
            _add(total, part, slices, is_begun=is_begun)
        begun = (True, True, True)
    for total, is_begun in zip(sums, begun, strict=True):
        if not is_begun:
            total.zero_()


def _add(total: Tensor, parts: Tensor, slices: Sequence[slice], *, is_begun: bool) -> None:
    """Add parts (n, rows, heads, D) to these rows of a sum, or set it.

    A sum that one call covers is copied: clearing and adding would move twice the bytes.
    """
    covers = parts.shape[0] * parts.shape[1] == len(total)
    if not is_begun and not covers:
        total.zero_()
    for rows, part in zip(slices, parts, strict=True):
        into = total[rows]
        if is_begun or not covers:
            into.add_(part.view(into.shape))
        else:
            into.copy_(part.view(into.shape))


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
    if dout.is_cuda and dout.numel() and wide == torch.float32:
        from stretto.ops.attention import triton

        into = dout.new_empty(dout.shape[:-1], dtype=wide)
        triton.delta(dout.contiguous(), out.contiguous(), into)
        return into
    return (dout.to(wide) * out.to(wide)).sum(-1)


@torch.no_grad()
def surrogate(dout: Tensor, delta: Tensor, like: Tensor | None = None) -> Tensor:
    """A stand-in for `out` in backward: rowsum(dout * surrogate) = delta, and no longer than out.

    Kernels take `out` only to form delta, so a rank that holds dout and delta of other ranks' rows
    needs no `out` of theirs. Row by row dout * delta / |dout|^2, with |dout| taken after division
    by its largest entry, so that neither 1e-30 nor 1e4 leaves the range; 0 where dout is 0.
    dout is (L, B, H, D), delta (L, B, H) in float32 (float64 for float64).
    Returns dout's dtype, laid out as `like` (dout unless given): cuDNN's backward is silently wrong
    when out is laid out otherwise than its forward lays it out.
    """
    result = torch.empty_like(dout if like is None else like)
    wide = wide_dtype(dout.dtype)
    fused = dout.is_cuda and wide == torch.float32 and result.is_contiguous()
    if result.numel() == 0:
        return result
    if fused:
        from stretto.ops.attention import triton

        triton.surrogate(dout.contiguous(), delta.contiguous(), result)
        return result
    dout = dout.to(wide)
    peak = dout.abs().amax(-1, keepdim=True)
    unit = dout / peak.masked_fill_(peak == 0, 1.0)
    length = unit.square().sum(-1, keepdim=True)
    factor = delta[..., None] / peak / length.masked_fill_(length == 0, 1.0)
    return result.copy_(unit * factor)


def _forward(
    batch: Batch, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """out (n, r, B * H, D), contiguous, and lse (n, r, B * H), a view, of a batch of pieces."""
    causal = batch.kind != "full"
    assert not causal or batch.q_rows == batch.k_rows, f"a {batch.kind} piece is square: {batch}"
    views = batch.q_view(q), batch.k_view(k), batch.k_view(v)
    out, lse = backend.forward(*(_heads(x, backend) for x in views), causal, scale)
    return batch.restored(_unpadded(out, q)).contiguous(), batch.restored(lse)


def _backward(
    batch: Batch,
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
    heads = [_heads(x, backend) for x in (*views, batch.q_view(out).contiguous())]
    gradients = backend.backward(*heads, batch.statistics(lse), batch.kind != "full", scale)
    dq, dk, dv = (batch.restored(_unpadded(x, q)).contiguous() for x in gradients)
    return dq, dk, dv


def _heads(x: Tensor, backend: Backend) -> Tensor:
    """(n, rows, heads, D) as kernels take it: heads before rows, D padded with zeros."""
    padding = -x.shape[-1] % backend.head_multiple
    # Before the transposition, so that rows stay outermost in memory for every kernel.
    return (functional.pad(x, (0, padding)) if padding else x).transpose(1, 2)


def _unpadded(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[-1] == q.shape[-1] else x[..., : q.shape[-1]]
