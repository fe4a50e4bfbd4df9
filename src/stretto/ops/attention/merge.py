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

    acc and acc_lse are float32 (float64 for float64), views of some rows are fine; part is of any
    dtype, its lse of any strides. A side whose lse is -inf counts as absent whatever it holds, NaN
    too; both absent give out 0 and lse -inf. Any order of partials gives the same up to rounding of
    the accumulators.
    """
    if acc_lse_LBH.numel() == 0:
        return
    if acc_LBHD.is_cuda and acc_LBHD.dtype == torch.float32:
        # Here and not above: triton comes with CUDA builds of torch only.
        from stretto.ops.attention import triton

        triton.merge_(acc_LBHD, acc_lse_LBH, part_LBHD, part_lse_LBH.contiguous())
    else:
        _merge(acc_LBHD, acc_lse_LBH, part_LBHD, part_lse_LBH)


def _merge(acc: Tensor, acc_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    part_lse = part_lse.to(acc_lse.dtype)
    peak = torch.maximum(acc_lse, part_lse)
    peak = peak.masked_fill_(peak.isneginf(), 0.0)
    old, new = torch.exp(acc_lse - peak), torch.exp(part_lse - peak)
    total = old + new
    acc_lse.copy_(torch.log(total).add_(peak))
    total = total.masked_fill_(total == 0, 1.0)
    merged = _share(acc, old / total)
    acc.copy_(merged.add_(_share(part.to(acc.dtype), new / total)))


def _share(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight[..., None]
    return torch.where(weight == 0, 0.0, x * weight)
