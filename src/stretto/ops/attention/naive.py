"""Attention written out: the specification that every other path is compared with.

    B batch   H query heads   G key/value heads, H a multiple of G   Lq, Lk rows   D head dim

Probabilities and score gradients are rounded to the tensors' dtype before they are multiplied, as
fused kernels do, so in bfloat16 this is also the measure of the error that a dtype costs. Products
are summed and statistics kept in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one device, by an explicit table of scores.

    q is (B, H, Lq, D), k and v are (B, G, Lk, D); query head h reads key head h // (H / G).
    `visible` is (Lq, Lk) or broadcastable to (B, H, Lq, Lk), True where a query sees a key; None
    shows all. `scale` is D**-0.5 unless given.
    Returns out (B, H, Lq, D) in q's dtype and lse (B, H, Lq), the natural log-sum-exp, float32
    (float64 for float64). A row that sees no key has out 0 and lse -inf.
    """
    scores = _scores(q_BHLD, k_BGLD, visible, scale)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = _probabilities(scores, lse).to(q_BHLD.dtype)
    out = _wide(probabilities) @ _repeated(v_BGLD, q_BHLD)
    return out.to(q_BHLD.dtype), lse


def attention_backward(
    dout_BHLD: Tensor,
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    visible: Tensor | None = None,
    scale: float | None = None,
    *,
    lse: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their dtypes.

    Without `lse` and `delta` these are the gradients of this call. With them, (B, H, Lq) each and
    of the whole sequence, they are the share that these keys contribute: over blocks of keys, the
    parts of dq add up and dk, dv come out whole. delta is rowsum(dout * out).
    """
    scores = _scores(q_BHLD, k_BGLD, visible, scale)
    if lse is None:
        lse = torch.logsumexp(scores, dim=-1)
    probabilities = _probabilities(scores, lse)
    dout, v = _wide(dout_BHLD), _repeated(v_BGLD, q_BHLD)
    dprobabilities = dout @ v.mT
    if delta is None:
        delta = (dprobabilities * probabilities).sum(-1)
    factor = q_BHLD.shape[-1] ** -0.5 if scale is None else scale
    dscores = _wide((probabilities * (dprobabilities - delta[..., None])).to(q_BHLD.dtype))
    dq = dscores @ _repeated(k_BGLD, q_BHLD) * factor
    dk = dscores.mT @ _wide(q_BHLD) * factor
    dv = _wide(probabilities.to(q_BHLD.dtype)).mT @ dout
    return (
        dq.to(q_BHLD.dtype),
        _summed(dk, k_BGLD).to(k_BGLD.dtype),
        _summed(dv, v_BGLD).to(v_BGLD.dtype),
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are kept in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def _repeated(x_BGLD: Tensor, q_BHLD: Tensor) -> Tensor:
    """Keys or values with every head repeated for the query heads that read it."""
    return _wide(x_BGLD).repeat_interleave(q_BHLD.shape[1] // x_BGLD.shape[1], dim=1)


def _summed(gradient_BHLD: Tensor, x_BGLD: Tensor) -> Tensor:
    """A gradient of repeated heads, summed over the query heads that share one."""
    groups = x_BGLD.shape[1]
    return gradient_BHLD.unflatten(1, (groups, gradient_BHLD.shape[1] // groups)).sum(2)


def _scores(q: Tensor, k: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _wide(q) @ _repeated(k, q).mT * factor
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A row without keys has lse -inf, and -inf - -inf is NaN: its probabilities are 0.
    return torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
