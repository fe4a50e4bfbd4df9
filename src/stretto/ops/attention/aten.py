"""The attention kernels that torch ships, each as a pair with one signature.

    n equal pieces   H query heads   G key/value heads   r, s rows of q and k   D head dim

forward(q_nHrD, k_nGsD, v_nGsD, causal, scale) -> out_nHrD, lse_nHr
backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv

Tensors are views of rows-outermost storage, (n, r, H, D) in memory. No call has empty rows or
keys, causal calls have r == s, no row is without a key: the sentinels for such rows (0.0, +inf,
nothing, 0.0) never arise. Gradients come out right with the lse and out of the whole sequence.
Source: `_scaled_dot_product_*` of torch 2.11 and 2.13.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.ops.attention import naive

_ATEN = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Flash attention on the CPU; an empty k would end the process with SIGFPE."""
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


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
