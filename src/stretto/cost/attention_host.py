"""Ranks whose nodes are one host: its cores, not devices, carry messages, merge and wake.

Devices with links of their own move bytes inside a node, through an interface and in a kernel at
once. Processes on one machine do all three with the same cores, and only the time in which bytes
wait for a limited interface is free for other work. How free is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from stretto import axes
from stretto.cluster.model import Cluster
from stretto.cost.attention_bytes import Call, Term
from stretto.plan.options import Context, Gather, StarTrail
from stretto.quantities import Rate, Seconds

#: Phases whose receivers merge partial outputs, and those whose receivers add gradients.
_MERGED, _ADDED = ("row-out",), ("back-row-out", "back-owner")


class Host(BaseModel):
    """What a machine that is all nodes at once needs beside its links; all ranks at it.

    `overlap`: part of the shorter of work and wire time that passes beside the longer: 1 when
    they hide one another, 0 when one follows the other. `step`: seconds of a step without rows.
    `merge_rate`, `add_rate`: bytes/s of a rank's accumulators, forward and backward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlap: float = Field(ge=0, le=1)
    step: Seconds = 0.0
    merge_rate: Rate = Field(gt=0)
    add_rate: Rate = Field(gt=0)

    def rate(self, *, back: bool) -> float:
        return self.add_rate if back else self.merge_rate


class SharedHost(Cluster):
    """A cluster whose nodes share the cores of one host: emulated nodes, ranks on one machine."""

    host: Host


class Cost(NamedTuple):
    """Seconds of messages: `work` of the host's cores, and `wire`, in which links carry bytes.

    On devices that move bytes themselves all of it is wire, and `work` what kernels beside it lose.
    """

    work: float = 0.0
    wire: float = 0.0

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        return Cost(self.work + times * other.work, self.wire + times * other.wire)

    def over(self, count: int) -> Cost:
        return Cost(self.work / count, self.wire / count)

    def seconds(self, host: Host | None, more: float = 0.0) -> float:
        """Both together, with `more` seconds of other work of the cores meanwhile."""
        if host is None:
            return self.wire
        work = self.work + more
        return max(work, self.wire) + (1 - host.overlap) * min(work, self.wire)


def step_seconds(host: Host | None, context: Context, call: Call, steps: int, *, back: bool):
    """Seconds of the host in one step beside its kernel: the step itself, and adding its results.

    A single step of forward has nothing to add its result to.
    """
    if host is None:
        return 0.0
    rows = context.team * call.q_block
    if not back:
        return host.step + (rows / host.merge_rate if steps > 1 else 0.0)
    keys = call.kv_block(context.ulysses)
    if isinstance(context.schedule, StarTrail):
        keys *= context.team
    if isinstance(context.schedule, Gather):
        keys *= context.ring
    return host.step + (rows + keys) / host.add_rate


def arriving(term: Term, sizes: Mapping[str, int], host: Host) -> float:
    """Seconds in which a rank merges or adds what one go of a term brings it."""
    if term.phase not in _MERGED + _ADDED:
        return 0.0
    count = axes.size(term.axis, sizes) - 1 if term.pattern == "exchange" else 1
    return count * term.message / host.rate(back=term.phase in _ADDED)
