"""Seconds and memory of one sequence-parallel attention, forward and backward.

Seconds = exposed heads + row phases + sum over steps of max(kernel and copies, hop) + pipeline
fill. The last kernel has nothing to hide, so a plan never takes less than its hops and one kernel.
A kernel takes longer beside a message inside its node where that displaces it (`Link.displaces`).
On nodes that are one host its work, messages and merging, adds up beside the wires; see
`attention_host`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log2
from typing import NamedTuple

from stretto import axes
from stretto.cluster.model import Device, Kernel
from stretto.cost.attention_bytes import Call, Term, terms
from stretto.cost.attention_copies import copies_of
from stretto.cost.attention_host import Cost, step_seconds
from stretto.cost.attention_links import Fabric, cost_of
from stretto.plan.options import Context, Gather, StarTrail

#: FLOP of the backward kernel over those of the forward one: five products against two.
BACKWARD_FLOPS = 2.5
#: Part of a device's matmul rate that attention kernels reach, where no kernel rate is known;
#: forward and backward. Of one H200: 0.67 and 0.56 with cuDNN, 0.36 and 0.31 with flash
#: (measured, 2026-11).
UNKNOWN_PART = (0.5, 0.42)


@dataclass(frozen=True)
class Pass:
    """Seconds of one forward or backward. `kernels`, `hops`: the sums that the walk overlaps."""

    heads: float
    rows: float
    walk: float
    kernels: float
    hops: float

    @property
    def seconds(self) -> float:
        return self.heads + self.rows + self.walk

    @property
    def least(self) -> float:
        """Kernels and hops hide one another completely; hops of two levels may one another too."""
        return self.heads + self.rows + min(self.walk, max(self.kernels, self.hops))

    @property
    def most(self) -> float:
        """Nothing is hidden, or what is hidden costs kernels more than it would take by itself."""
        return self.heads + self.rows + max(self.walk, self.kernels + self.hops)


def kernel_of(device: Device, dtype: str) -> Kernel:
    """Rates of attention kernels on a device. Raises ConfigError for a dtype without a rate."""
    if device.attention is not None and dtype in ("bf16", "fp16"):
        return device.attention
    rate = device.flop_rate(dtype)
    forward, backward = (part * rate for part in UNKNOWN_PART)
    source = f"projected: {UNKNOWN_PART[0]:g} and {UNKNOWN_PART[1]:g} of {device.source}"
    launch = device.attention.launch if device.attention else 0.0
    return Kernel(forward=forward, backward=backward, launch=launch, source=source)


def part_of_rate(kernel: Kernel, rows: float, *, back: bool = False) -> float:
    """What blocks of `rows` rows on the shorter side leave of the kernel's rate."""
    points = [(entry[0], entry[2 if back else 1]) for entry in kernel.short]
    if not points or rows >= points[-1][0]:
        return points[-1][1] if points else 1.0
    if rows <= points[0][0]:
        return points[0][1] * rows / points[0][0]
    above = next(index for index, (limit, _) in enumerate(points) if limit >= rows)
    (low, start), (high, end) = points[above - 1], points[above]
    return start + (end - start) * log2(rows / low) / log2(high / low)


def block_rows(context: Context, call: Call) -> int:
    """Rows of the shorter side of one kernel call."""
    u = context.ulysses
    if isinstance(context.schedule, StarTrail):
        return context.team * u * min(call.rows, call.kv_rows)
    keys = context.ring if isinstance(context.schedule, Gather) else 1
    return u * min(call.rows * context.team, call.kv_rows * keys)


def kernel_seconds(
    context: Context, call: Call, kernel: Kernel, pairs: Sequence[float], *, back: bool
) -> list[float]:
    """Seconds of each step's kernels, from the (query, key) pairs of its busiest rank."""
    flops = 4 * call.batch * call.head_dim * (call.heads // context.ulysses)
    rate = part_of_rate(kernel, block_rows(context, call), back=back)
    rate *= kernel.backward if back else kernel.forward
    flops *= BACKWARD_FLOPS if back else 1.0
    return [flops * each / rate + kernel.launch * (each > 0) for each in pairs]


def pass_of(
    context: Context,
    call: Call,
    kernels: Sequence[float],
    fabric: Fabric,
    sizes: Mapping[str, int],
    *,
    back: bool,
    copy_rate: float = inf,
) -> Pass:
    """Times of one pass. `kernels`: seconds per step; `sizes`: the mesh, in physical order.

    `copy_rate`: bytes/s that a device reads and writes in its own memory, around its kernels; on
    nodes that are one host `attention_host` knows what that takes. Steps after the last one with
    work are neither walked nor waited for where the plan prunes.
    """
    found = terms(context, call, back=back)
    heads = sum(_waited(t, sizes, fabric) for t in found if t.axis == "ulysses")
    rows = sum(_waited(t, sizes, fabric) for t in found if not t.hidden and t.axis != "ulysses")
    hidden = [t for t in found if t.hidden]
    if getattr(context.schedule, "prune", False):
        used = [index for index, each in enumerate(kernels) if each > 0]
        kernels = kernels[: (used[-1] if used else 0) + 1]
        hidden = [_pruned(t, context, len(kernels)) for t in hidden]
    beside = step_seconds(fabric.host, context, call, len(kernels), back=back)
    if fabric.host is None:
        copies = copies_of(context, call, len(kernels), back=back)
        heads, rows = heads + copies.heads / copy_rate, rows + copies.rows / copy_rate
        beside = copies.step / copy_rate
    walk = _Walk([Step(kernel, beside) for kernel in kernels], fabric)
    seconds, hops = walk.seconds(hidden, context, sizes)
    return Pass(heads, rows, seconds, sum(kernels) + beside * len(kernels), hops)


def _pruned(term: Term, context: Context, steps: int) -> Term:
    """The part of a term that a walk of fewer steps still makes."""
    most = context.ring - 1
    left = min(1.0, (steps - 1) / most) if most else 0.0
    if term.pattern == "exchange":
        return Term(term.phase, term.pattern, term.axis, round(term.message * left), hidden=True)
    times = -(-term.times * (steps - 1) // most) if most else 0
    return Term(term.phase, term.pattern, term.axis, term.message, times, hidden=True)


class Step(NamedTuple):
    """Seconds of a step: its kernel, and what the host or the device does around it."""

    kernel: float
    beside: float

    @property
    def seconds(self) -> float:
        return self.kernel + self.beside


@dataclass(frozen=True, slots=True)
class _Walk:
    """The steps of a pass, and the links that bring their blocks."""

    steps: Sequence[Step]
    fabric: Fabric

    def seconds(
        self, hidden: Sequence[Term], context: Context, sizes: Mapping[str, int]
    ) -> tuple[float, float]:
        """(seconds of the walk, seconds of its hops alone).

        An inner hop hides under one step, an outer hop under a cycle of the inner ring. What
        returns to owners follows each step and is spread over them; the last return follows the
        last kernel and hides under nothing.
        """
        host = self.fabric.host
        inner, outer, fill = Cost(), Cost(), 0.0
        for term in hidden:
            cost, goes = cost_of(term, sizes, self.fabric), _goes(term, sizes)
            last = 1 / goes if goes and term.phase == "back-owner" and term.times else 0.0
            fill += last * cost.seconds(host)
            if term.axis == "ring_out":
                outer = outer.plus(cost, term.times - last)
            else:
                inner = inner.plus(cost, term.times - last)
        cycle = context.inner[1] if context.two_level else len(self.steps)
        cycles = [self.steps[at : at + cycle] for at in range(0, len(self.steps), max(cycle, 1))]
        hops_in = sum(max(0, len(steps) - 1) for steps in cycles)
        one_in, one_out = inner.over(max(hops_in, 1)), outer.over(max(len(cycles) - 1, 1))
        seconds = sum(self._crossed(self._hidden(steps, one_in), one_out) for steps in cycles[:-1])
        seconds += self._hidden(cycles[-1], one_in) if cycles else 0.0
        return seconds + fill, inner.seconds(host) + outer.seconds(host) + fill

    def _hidden(self, steps: Sequence[Step], hop: Cost) -> float:
        """Each kernel beside the hop that brings the next block; nothing beside the last.

        A kernel that would end before its hop loses less than all that the hop displaces, but
        then the hop is the longer of the two, up to a `displaces` of 1.
        """
        host = self.fabric.host
        displaced = hop.work if host is None else 0.0
        seconds = sum(
            max(step.seconds + displaced, hop.seconds(host, step.beside)) for step in steps[:-1]
        )
        return seconds + (steps[-1].seconds if steps else 0.0)

    def _crossed(self, cycle: float, hop: Cost) -> float:
        """A cycle of the inner ring beside the outer hop, whose work is the host's or displaces."""
        return max(cycle + hop.work, hop.seconds(self.fabric.host))


def _goes(term: Term, sizes: Mapping[str, int]) -> int:
    """Messages that one rank sends in one go."""
    return max(1, axes.size(term.axis, sizes) - 1) if term.pattern == "exchange" else 1


def _waited(term: Term, sizes: Mapping[str, int], fabric: Fabric) -> float:
    """Seconds of a term under which nothing hides."""
    return term.times * cost_of(term, sizes, fabric).seconds(fabric.host)
