"""The attention kernels that torch ships, each as a pair with one signature.

    n equal pieces   H query heads   G key/value heads   r, s rows of q and k   D head dim

forward(q_nHrD, k_nGsD, v_nGsD, causal, scale) -> out_nHrD, lse_nHr
backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv

Tensors are views of rows-outermost storage, (n, r, H, D) in memory. No call has empty rows or
keys, causal calls have r == s, no row is without a key: the sentinels of such rows (0.0, inf,
nothing, 0.0) never arise. Gradients come out right with the lse and out of the whole sequence.
Source: `_scaled_dot_product_*` of torch 2.11 and 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stretto.ops.attention import naive

_ATEN = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def _signed_forward(kernel: Callable[..., tuple[Tensor, Tensor]]):
    """The kernel for any scale: they hide keys by -inf first and multiply by the scale then.

    Zero would make NaN of hidden keys, a negative number the greatest scores. So the sign goes to
    the queries.
    """

    @functools.wraps(kernel)
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float):
        if scale > 0:
            return kernel(q, k, v, causal, scale)
        sign = -1 if scale < 0 else 0
        return kernel(q * sign, k, v, causal, -scale or 1.0)

    return forward


def _signed_backward(kernel: Callable[..., Gradients]):
    """Its gradients, those of queries by the same sign."""

    @functools.wraps(kernel)
    def backward(dout: Tensor, q: Tensor, *others):
        *tensors, causal, scale = others
        if scale > 0:
            return kernel(dout, q, *tensors, causal, scale)
        sign = -1 if scale < 0 else 0
        dq, dk, dv = kernel(dout, q * sign, *tensors, causal, -scale or 1.0)
        return dq * sign, dk, dv

    return backward


@_signed_forward
def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Flash attention on the CPU; an empty k would end the process with SIGFPE."""
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


@_signed_backward
def cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Its gradients."""
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )


@_signed_forward
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Flash attention 2 of torch: half precision, head dims that are multiples of 8 up to 256."""
    found = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


@_signed_backward
def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Its gradients. Both seeds serve dropout alone."""
    seed = lse.new_empty(2, dtype=torch.uint64)
    return _ATEN._scaled_dot_product_flash_attention_backward(
        *(dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2]),
        *(0.0, causal, seed, seed),
        scale=scale,
    )


@_signed_forward
def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """cuDNN's attention: half precision, head dims that are multiples of 8 up to 128.

    It takes no single row and no single key; flash does those.
    """
    if min(q.shape[2], k.shape[2]) == 1:
        return flash_forward(q, k, v, causal, scale)
    found = _ATEN._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    # (n, H, r, 1), unlike the others.
    return found[0], found[1].squeeze(-1)


@_signed_backward
def cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Its gradients; dq differs in its last bits from call to call.

    Its graphs are remembered by the strides of q, k and v alone: an `out` laid out otherwise than
    the forward's output gives silently wrong dq and dk (relative rms 0.5, H200, torch 2.11).
    """
    if min(q.shape[2], k.shape[2]) == 1:
        return flash_backward(dout, q, k, v, out, lse, causal, scale)
    assert out.stride() == torch.empty_like(q).stride(), (out.stride(), q.stride())
    seed = lse.new_empty((), dtype=torch.int64)
    return _ATEN._scaled_dot_product_cudnn_attention_backward(
        *(dout, q, k, v, out, lse[..., None], seed, seed, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, causal),
        scale=scale,
    )


@_signed_forward
def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernels: float32 too, any head dim in 16-byte steps, no shared heads."""
    k, v = _for_all_heads(q, k, v)
    found = _ATEN._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    # Its lse is padded to a multiple of 32 rows.
    return found[0], found[1].narrow(-1, 0, q.shape[2])


@_signed_backward
def efficient_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Its gradients, those of shared heads summed in float32."""
    shared = q.shape[1] // k.shape[1]
    k, v = _for_all_heads(q, k, v)
    padding = -lse.shape[2] % 32
    # exp(score - inf) is 0: padding rows add nothing.
    lse = functional.pad(lse, (0, padding), value=float("inf")) if padding else lse
    seed = lse.new_empty((), dtype=torch.int64)
    dq, dk, dv, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
        *(dout, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal),
        scale=scale,
    )
    if shared == 1:
        return dq, dk, dv
    dk, dv = (
        x.unflatten(1, (-1, shared)).sum(2, dtype=torch.float32).to(q.dtype) for x in (dk, dv)
    )
    return dq, dk, dv


def _for_all_heads(q: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    shared = q.shape[1] // keys[0].shape[1]
    return keys if shared == 1 else tuple(x.repeat_interleave(shared, 1) for x in keys)


def naive_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The specification as a back end: any device and dtype, memory quadratic in the rows."""
    return naive.attention(q, k, v, _square(q, causal), scale)


def naive_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Its gradients."""
    wide = naive.wide_dtype(out.dtype)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)
    visible = _square(q, causal)
    return naive.attention_backward(dout, q, k, v, visible, scale, lse=lse, delta=delta)


def _square(q: Tensor, causal: bool) -> Tensor | None:
    rows = q.shape[2]
    return torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril_() if causal else None
