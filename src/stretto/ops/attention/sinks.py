"""Attention sinks: a logit per query head that joins every softmax and carries no value.

With lse' = log(exp(lse) + exp(sink)) probabilities are exp(score - lse'), so the output is scaled
by exp(lse - lse') and the ordinary backward, given lse' and the scaled output, is exact as it is.

    B batch   H query heads   L rows here
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stretto.errors import ShapeError
from stretto.ops.attention.rank import Saved


def check(sinks: Tensor, q: Tensor) -> None:
    """Raise ShapeError unless there is one sink per query head, on its device."""
    if not isinstance(sinks, Tensor):
        raise ShapeError(
            f"sinks are a {type(sinks).__name__}; expected a tensor of {q.shape[1]} logits"
        )
    if sinks.shape != (q.shape[1],) or sinks.device != q.device:
        raise ShapeError(
            f"sinks have shape {tuple(sinks.shape)} on {sinks.device}; expected one per query "
            f"head, ({q.shape[1]},) on {q.device}"
        )


def joined(
    out_BHLD: Tensor, lse_BHL: Tensor, saved: Saved, sinks_H: Tensor
) -> tuple[Tensor, Tensor, Saved]:
    """Output and log-sum-exp with the sinks in every softmax, and what backward then needs."""
    sinks = sinks_H.to(lse_BHL.dtype)
    lse = torch.logaddexp(lse_BHL, sinks[:, None])
    scale = torch.exp(lse_BHL - lse)[..., None]
    # Laid out as the kernel's own, which backward kernels count on.
    out = torch.empty_like(out_BHLD).copy_(out_BHLD.to(scale.dtype) * scale)
    u, case = saved.job.schedule.context.ulysses, saved.job.schedule.case
    # After the exchange of heads this rank's statistics are those of its share of them.
    own = sinks.chunk(u)[case.rank % u]
    return out, lse, replace(saved, out=out, lse=torch.logaddexp(saved.lse, own))


def gradient(dout_BHLD: Tensor, out_BHLD: Tensor, lse_BHL: Tensor, sinks_H: Tensor) -> Tensor:
    """(H,) this rank's share: a sink has value 0, so its score's gradient is -p * dO . O."""
    wide = lse_BHL.dtype
    along = (dout_BHLD.to(wide) * out_BHLD.to(wide)).sum(-1)
    share = torch.exp(sinks_H.to(wide)[:, None] - lse_BHL) * along
    return -share.sum((0, 2)).to(sinks_H.dtype)
