"""Ulysses alone, its heads in two halves: one half travels while the other is computed.

    B batch   H query heads   G key/value heads   L rows here   D head dim

Same bytes as in one go, twice the messages. Of 31 ms at 32k tokens on two H200 1.5 to 2.5 were
messages that nothing hid. Only where a rank's work is one kernel call: nothing is to be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from torch import Tensor

from stretto.ops.attention import backends
from stretto.ops.attention.block import Block, public, rows_first
from stretto.ops.attention.job import Job
from stretto.ops.attention.rows import heads_exchanged, heads_home, own_heads
from stretto.plan.column import kv_heads

HALVES = 2


@dataclass(slots=True)
class Half:
    """Half of a rank's heads after the exchange: all rows of q, k and v, and lse of q's rows."""

    q: Block
    kv: Block
    lse: Tensor

    def apart(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Half]]:
        (q, again_q), (kv, again_kv) = self.q.apart(), self.kv.apart()
        return [*q, *kv, self.lse], partial(_half, again_q, len(q), again_kv)


def _half(again_q: Callable, count: int, again_kv: Callable, tensors: Sequence[Tensor]) -> Half:
    return Half(again_q(tensors[:count]), again_kv(tensors[count:-1]), tensors[-1])


@dataclass(slots=True)
class SavedHalves:
    """What backward needs of forward; `out` is (B, H, L, D) as returned."""

    job: Job
    out: Tensor
    halves: list[Half]

    def apart(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], SavedHalves]]:
        """Its tensors, and what makes it of them again, which holds none."""
        tensors, frames = [self.out], []
        for half in self.halves:
            own, again = half.apart()
            tensors += own
            frames.append((len(own), again))
        return tensors, partial(_together, self.job, frames)


def _together(
    job: Job, frames: list[tuple[int, Callable]], tensors: Sequence[Tensor]
) -> SavedHalves:
    out, *others = tensors
    left = iter(others)
    return SavedHalves(job, out, [again(list(islice(left, count))) for count, again in frames])


def is_halved(job: Job) -> bool:
    """Whether heads can go in halves, and a device computes while others carry messages."""
    case, u = job.schedule.case, job.schedule.context.ulysses
    return (
        u > 1
        and job.is_one_kernel
        and _hides_messages(job)
        and case.heads_kv >= u
        and not (case.heads_q // u) % HALVES
        and not kv_heads(case, u) % HALVES
    )


def _hides_messages(job: Job) -> bool:
    return job.device.type == "cuda"


def forward(job: Job, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, SavedHalves]:
    """out like q, lse (B, H, L) if asked for, and what backward needs; as `rank.forward_rank`."""
    of_q, of_kv = job.schedule.forward.before
    (home,) = job.schedule.forward.after
    piece = job.schedule.forward.turns[0].steps[0].pieces[0]
    jobs = [replace(job, part=(index, HALVES)) for index in range(HALVES)]
    coming = [
        (
            heads_exchanged(each, [of_q], {"q": rows_first(q)}),
            heads_exchanged(each, [of_kv], {"k": rows_first(k), "v": rows_first(v)}),
        )
        for each in jobs
    ]
    going, halves, into = [], [], own_heads(job, *home.tensors)
    for each, (queries, keys) in zip(jobs, coming, strict=True):
        own_q, own_kv = queries.wait(), keys.wait()
        out, lse = backends.forward(
            own_q["q"], own_kv["k"], own_kv["v"], piece.kind, job.scale, job.backend
        )
        made = {"out": out, "lse": lse}
        block = Block.resting(job.schedule.q, {name: made[name] for name in home.tensors})
        going.append(heads_home(each, home, block, into))
        halves.append(Half(own_q, own_kv, lse))
    for pending in going:
        pending.wait()
    result = public(into["out"])
    return result, public(into["lse"]) if "lse" in into else None, SavedHalves(job, result, halves)


def backward(dout: Tensor, saved: SavedHalves) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, for dout like out."""
    job = saved.job
    (heads,) = job.schedule.backward.before
    of_q, of_kv = job.schedule.backward.after
    dout_LBHD = rows_first(dout).contiguous()
    given = {"dout": dout_LBHD, "delta": backends.delta(dout_LBHD, rows_first(saved.out))}
    jobs = [replace(job, part=(index, HALVES)) for index in range(HALVES)]
    coming = [heads_exchanged(each, [heads], given) for each in jobs]
    into = own_heads(job, *of_q.tensors) | own_heads(job, *of_kv.tensors)
    going = []
    for each, half, queries in zip(jobs, saved.halves, coming, strict=True):
        dq, sums = _gradients(job, half, queries.wait())
        going += [heads_home(each, of_q, dq, into), heads_home(each, of_kv, sums, into)]
    for pending in going:
        pending.wait()
    return public(into["dq"]), public(into["dk"]), public(into["dv"])


def _gradients(job: Job, half: Half, queries: Block) -> tuple[Block, Block]:
    """The kernel's own gradients of a half, in the inputs' dtype."""
    dout, delta = queries["dout"], queries["delta"]
    kind = job.schedule.backward.turns[0].steps[0].pieces[0].kind
    dq, dk, dv = backends.backward(
        dout,
        half.q["q"],
        half.kv["k"],
        half.kv["v"],
        backends.surrogate(dout, delta),
        half.lse,
        kind,
        job.scale,
        job.backend,
    )
    return Block.resting(half.q.rows, {"dq": dq}), Block.resting(half.kv.rows, {"dk": dk, "dv": dv})
