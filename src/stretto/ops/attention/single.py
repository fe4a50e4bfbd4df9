"""Calls whose only work is one piece on one rank: the kernel on the caller's own tensors.

    B batch   H query heads   G key/value heads   L, S rows of q and of k, v   D head dim

Nothing is moved, merged or brought into storage order, and log-sum-exp stays as the kernel gave it:
what a GPU runs is what it runs in torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from stretto.ops.attention.backends import Backend, Gradients
from stretto.ops.attention.job import Job
from stretto.plan.schedule import Schedule

#: Kernels load runs of so many bytes.
_RUN_BYTES = 16


@dataclass(slots=True)
class Single:
    """What backward needs of forward.

    `q` (B, H, L, D), `k` and `v` (B, G, S, D): the caller's. `out`: as the kernel laid it out.
    `lse`: the kernel's as a view in storage order, (L, B, H).
    """

    job: Job
    causal: bool
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def apart(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Single]]:
        """Its tensors, and what makes it of them again, which holds none."""
        tensors = [self.q, self.k, self.v, self.out, self.lse]
        return tensors, partial(_together, self.job, self.causal)


def _together(job: Job, causal: bool, tensors: Sequence[Tensor]) -> Single:
    return Single(job, causal, *tensors)


def is_single(schedule: Schedule) -> bool:
    """Whether all the call does is one rectangle or causal square of all rows here."""
    steps, back = list(schedule.forward.steps), list(schedule.backward.steps)
    if len(steps) != 1 or len(back) != 1 or any(True for _ in schedule.moves()):
        return False
    (step,) = steps
    whole = ((0, schedule.q.rows), (0, schedule.kv.rows))
    return (
        [(piece.q, piece.k) for piece in step.pieces] == [whole]
        and step.pieces[0].kind != "anticausal"
        and not step.kept
    )


def takes(backend: Backend, *tensors: Tensor) -> bool:
    """Whether the kernel can read these tensors where they lie."""
    return tensors[0].shape[-1] % backend.head_multiple == 0 and all(map(_readable, tensors))


def forward(job: Job, q: Tensor, k: Tensor, v: Tensor) -> Single:
    """One call of the kernel. `is_single` and `takes` have said yes."""
    causal = job.schedule.forward.turns[0].steps[0].pieces[0].kind == "causal"
    out, lse = job.backend.forward(q, k, v, causal, job.scale)
    return Single(job, causal, q, k, v, out, lse.movedim(2, 0))


def backward(dout: Tensor, saved: Single) -> Gradients:
    """One call of the kernel's gradients: dq, dk, dv like q, k, v, for dout like out."""
    # A gradient may be one number seen as many: kernels read rows.
    dout = dout if _readable(dout) else dout.contiguous()
    tensors = (dout, saved.q, saved.k, saved.v, saved.out, saved.lse.movedim(0, 2))
    return saved.job.backend.backward(*tensors, saved.causal, saved.job.scale)


def _readable(x: Tensor) -> bool:
    """Rows side by side in memory, and each of them where a run of bytes may begin."""
    run = max(1, _RUN_BYTES // x.element_size())
    *outer, inner = zip(x.shape, x.stride(), strict=True)
    return (
        inner[1] == 1
        and x.storage_offset() % run == 0
        and all(size == 1 or (stride > 0 and stride % run == 0) for size, stride in outer)
    )
