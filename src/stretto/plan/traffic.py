"""Bytes on the wire, exact: what an option declares and what a counting mesh records.

Unit everywhere: bytes *sent by one rank to other ranks*. All-gather of n bytes per rank on an axis
of P ranks: (P-1)n. Broadcast of n bytes: (P-1)n at the root, 0 elsewhere. Point to point: as sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Lane(NamedTuple):
    """Where bytes belong: the phase of the work, the collective verb, the mesh axis."""

    phase: str
    verb: str
    axis: str


@dataclass(slots=True)
class Traffic:
    """Bytes sent by one rank, per lane. Adds up, compares, and iterates over its lanes."""

    lanes: Counter[Lane] = field(default_factory=Counter)

    def add(self, phase: str, verb: str, axis: str, num_bytes: int) -> None:
        """Record bytes; zero leaves no lane behind, so that equal traffic compares equal."""
        if num_bytes:
            self.lanes[Lane(phase, verb, axis)] += num_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.lanes + other.lanes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traffic) and self.lanes == other.lanes

    def __iter__(self) -> Iterator[tuple[Lane, int]]:
        return iter(sorted(self.lanes.items()))

    def total(self, *, phase: str | None = None, axis: str | None = None) -> int:
        """Bytes over all lanes, or those of one phase or one axis."""
        return sum(
            n
            for lane, n in self.lanes.items()
            if phase in (None, lane.phase) and axis in (None, lane.axis)
        )
