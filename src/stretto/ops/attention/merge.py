"""Merging partial attention results by their log-sum-exp, in place.

L rows   B batch   H query heads   D head dim; storage is rows outermost, (L, B, H, D)
"""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.ops.attention.naive import wide_dtype


def accumulators(q_LBHD: Tensor) -> tuple[Tensor, Tensor]:
    """Sums that hold nothing yet, for q's rows: out 0 (L, B, H, D) and lse -inf (L, B, H).

    float32, or float64 for float64.
    """
    dtype = wide_dtype(q_LBHD.dtype)
    acc = torch.zeros(q_LBHD.shape, dtype=dtype, device=q_LBHD.device)
    return acc, torch.full(q_LBHD.shape[:-1], float("-inf"), dtype=dtype, device=q_LBHD.device)


def merge_(acc_LBHD: Tensor, acc_lse_LBH: Tensor, part_LBHD: Tensor, part_lse_LBH: Tensor) -> None:
    """Add one partial result to the accumulators, in place and in one pass.

    acc and acc_lse are float32 (float64 for float64) and may be views of some rows; part is of any
    dtype. A side whose lse is -inf counts as absent whatever its values are, NaN too; both absent
    leaves out 0 and lse -inf. Exact up to rounding in the accumulators' dtype for any order.
    """
    if acc_lse_LBH.numel() == 0:
        return
    part_lse = part_lse_LBH.to(acc_lse_LBH.dtype)
    peak = torch.maximum(acc_lse_LBH, part_lse)
    peak = peak.masked_fill_(peak.isneginf(), 0.0)
    old, new = torch.exp(acc_lse_LBH - peak), torch.exp(part_lse - peak)
    total = old + new
    acc_lse_LBH.copy_(total.log().add_(peak))
    total = total.masked_fill_(total == 0, 1.0)
    part = part_LBHD.to(acc_LBHD.dtype)
    acc_LBHD.copy_(
        _weighted(acc_LBHD, old / total).add_(_weighted(part, new / total)),
    )


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight[..., None]
    return torch.where(weight == 0, 0.0, x * weight)
