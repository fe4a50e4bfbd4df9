"""What kernels lose to messages beside them: a kernel alone, and beside a message it outlasts.

No script. All ranks measure together over the carrier that a run uses. Every timed stretch follows
kernels that keep the device busy while the host issues it, and a message of a byte between all
ranks, so that their devices begin together and no launch is part of a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from job import Rank, Stamps, median, slowest

from stretto.cluster.model import MOST_DISPLACED
from stretto.mesh.mesh import Mesh, Pending

#: A message's time at the link's rate as part of the kernel's: it begins with the kernel and has to
#: end before it, also where both slow one another down.
PART_OF_KERNEL = 0.5
#: The largest message that a probe sends.
MOST_BYTES = 2**28
#: Calls before a timed stretch; together they outlast what the host does for it.
AHEAD = 3
AXIS, PHASE = "step", "probe"


@dataclass(frozen=True)
class Beside:
    """A kernel and a message of `num_bytes` to the next rank: median seconds of the slowest rank.

    `alone`: the kernel. `message`: the message. `beside`: the kernel while the message moves.
    `both`: until the message has arrived, too; much above `beside`, a message that waits for the
    kernel to let it through.
    """

    kernel: str
    num_bytes: int
    alone: float
    message: float
    beside: float
    both: float

    @property
    def lost(self) -> float:
        """By how much a step of a walk is longer for a message that is shorter than its kernel."""
        return self.both - self.alone


def part_displaced(found: Sequence[Beside], rate: float) -> float:
    """`Link.displaces`: seconds lost over seconds of the bytes at a link's rate, of all kernels.

    Not over the messages' own seconds: estimates multiply by bytes / rate, whatever the fit of the
    rate is worth. Noise of links that take nothing, or take too much, ends at the limits.
    """
    part = sum(each.lost for each in found) / sum(each.num_bytes / rate for each in found)
    return round(min(max(part, 0.0), MOST_DISPLACED), 3)


def measure(
    bench: Rank,
    mesh: Mesh,
    kernels: Mapping[str, Callable[[], Any]],
    rate: float,
    *,
    most_bytes: int = MOST_BYTES,
    turns: int = 11,
) -> list[Beside]:
    """Each kernel alone and beside a message on the mesh's step axis; every rank calls it.

    `rate`: bytes/s of the link, of which messages get their size; the same on all ranks.
    """
    found = []
    for name, work in kernels.items():
        _Stretch(bench, mesh, work).seconds(kernel=True)
        first = _Stretch(bench, mesh, work).seconds(kernel=True)
        num_bytes = message_bytes(max(bench.collect(first[0])), rate, most_bytes)
        found.append(_beside(bench, _Stretch(bench, mesh, work, num_bytes), name, turns))
    return found


def message_bytes(kernel_s: float, rate: float, most: int) -> int:
    """Bytes that take PART_OF_KERNEL of a kernel's seconds at a link's rate."""
    return max(1, min(most, int(PART_OF_KERNEL * kernel_s * rate)))


def _beside(bench: Rank, stretch: _Stretch, name: str, turns: int) -> Beside:
    """All three ways in turns, forwards and backwards, after one turn that warms them."""
    ways = {
        "alone": {"kernel": True},
        "beside": {"kernel": True, "message": True},
        "message": {"message": True},
    }
    times: dict[str, list[list[float]]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            times[way].append(stretch.seconds(**ways[way]))
    every = bench.collect({way: taken[1:] for way, taken in times.items()})

    def middle(way: str, parts: int = 2) -> float:
        return median(slowest([[sum(pair[:parts]) for pair in rank[way]] for rank in every]))

    own = {"alone": middle("alone"), "message": middle("message")}
    return Beside(name, stretch.num_bytes, **own, beside=middle("beside", 1), both=middle("beside"))


class _Stretch:
    """One timed stretch of a rank: a kernel, a message to the next rank, or both at once."""

    def __init__(self, bench: Rank, mesh: Mesh, work: Callable[[], Any], num_bytes: int = 0):
        self.bench, self.mesh, self.work, self.num_bytes = bench, mesh, work, num_bytes
        self._rank, self._size = mesh.rank(AXIS), mesh.size(AXIS)
        made = {"dtype": torch.uint8, "device": bench.device}
        self._out, self._into = (torch.zeros(num_bytes, **made) for _ in range(2))
        self._byte = torch.zeros(1, **made)
        self._bytes = {p: torch.zeros(1, **made) for p in range(self._size) if p != self._rank}

    def seconds(self, *, kernel: bool = False, message: bool = False) -> list[float]:
        """[until the kernel has ended, what a message takes beyond that]; no kernel: 0 until then.

        The message begins first, as in a walk, and is waited for after the kernel.
        """
        self.bench.barrier()
        for _ in range(AHEAD):
            self.work()
        self._together()
        stamps = Stamps(self.bench.device)
        stamps.stamp()
        pending = self._sent() if message else None
        if kernel:
            self.work()
        stamps.stamp()
        if pending is not None:
            pending.wait()
        stamps.stamp()
        return [1e-3 * each for each in stamps.milliseconds()]

    def _together(self) -> None:
        """What the devices get from here on begins at one time: each has heard from all others."""
        sends = dict.fromkeys(self._bytes, self._byte)
        self.mesh.exchange(sends, self._bytes, AXIS, PHASE).wait()

    def _sent(self) -> Pending[dict[int, torch.Tensor]]:
        sends = {(self._rank - 1) % self._size: self._out}
        receives = {(self._rank + 1) % self._size: self._into}
        return self.mesh.exchange(sends, receives, AXIS, PHASE)
