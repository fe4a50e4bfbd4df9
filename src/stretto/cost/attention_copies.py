"""What a device reads and writes in its own memory around attention kernels.

Packing, merging, sums: bytes of one rank, after what `ops/attention` does with every tensor.
Nothing hides them, so short sequences feel them: 3 to 6 of 33 ms at 32k tokens on two H100.

    Q a rank's queries   K its keys and values   w width of sums over that of the inputs
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.cost.attention_bytes import Call
from stretto.plan.options import Context, Gather, StarTrail


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes read and written: around the exchange of heads, of rows, and in each step."""

    heads: float = 0.0
    rows: float = 0.0
    step: float = 0.0


def copies_of(context: Context, call: Call, steps: int, *, back: bool) -> Copies:
    """Of one pass whose walk makes `steps` steps."""
    sizes = _Sizes.of(context, call)
    if back:
        return Copies(sizes.heads_back(), sizes.rows_back(), sizes.sums(steps) / steps)
    return Copies(sizes.heads(), sizes.rows(), sizes.merges(steps) / steps)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of queries and of keys and values, the width of sums, and the plan they are for."""

    context: Context
    q: int
    kv: int
    wide: float

    @classmethod
    def of(cls, context: Context, call: Call) -> _Sizes:
        return cls(
            context,
            call.q_block,
            call.kv_block(context.ulysses),
            call.scalar_bytes / call.item_bytes,
        )

    @property
    def exchanged(self) -> float:
        """Per byte: read and written to leave, and to be put in its place."""
        u = self.context.ulysses
        return 2 * (2 * u - 1) / u if u > 1 else 0.0

    @property
    def added(self) -> float:
        """Per byte of a part: it is read, its sum read and written."""
        return 1 + 2 * self.wide

    @property
    def set(self) -> float:
        """Per byte of a part: it is read, and a sum written."""
        return 1 + self.wide

    @property
    def rounded(self) -> float:
        """Per byte of a result: its sum is read, and it is written where it is narrower."""
        return 1 + self.wide if self.wide > 1 else 0.0

    def heads(self) -> float:
        return self.exchanged * (2 * self.q + self.kv)

    def heads_back(self) -> float:
        """dO, then dQ and dK, dV; and what stands in for the output."""
        return self.heads() + self._stand_in(self.context.ulysses > 1)

    def rows(self) -> float:
        """The team's queries joined, its outputs cut, and those of own rows merged."""
        a = self.context.team
        if a == 1:
            return 0.0
        return self._keys_joined() + a * self.q * (2 + self.rounded + self.added)

    def rows_back(self) -> float:
        a = self.context.team
        if a == 1:
            return 0.0
        joined = 4 * a * self.q + self._keys_joined() + self._stand_in(True)
        return joined + self.q * (a * self.rounded + (a - 1) * self.added)

    def merges(self, steps: int) -> float:
        """Partial outputs of all steps into accumulators, which are cleared, and the result."""
        parts = self._parts(steps)
        if parts == 1:
            return 0.0
        rows = self.context.team * self.q
        return rows * (self.wide + parts * self.added + self.rounded)

    def sums(self, steps: int) -> float:
        """dQ of all steps; dK and dV of each, and those that arrive; the result."""
        parts = self._parts(steps)
        if parts == 1:
            return 0.0
        a, ring = self.context.team, self.context.ring
        rows = a * self.q * (self.set + (parts - 1) * self.added + self.rounded)
        # Keys at hand in a step, keys whose sums arrive, and how often they do.
        held, home, arrivals = self.kv, self.kv, ring - 1
        if isinstance(self.context.schedule, StarTrail):
            held, home, arrivals = a * self.kv, a * self.kv, steps
        elif isinstance(self.context.schedule, Gather):
            held = ring * self.kv
        return rows + steps * held * self.set + home * (arrivals * self.added + self.rounded)

    def _parts(self, steps: int) -> int:
        """Kernel calls whose results meet; a zigzagged rank's one column has two pieces."""
        one_column = isinstance(self.context.schedule, Gather) or self.context.team > 1
        return max(steps, 2) if one_column else steps

    def _stand_in(self, is_needed: bool) -> float:
        """The products of dO and the output, and the stand-in made of them."""
        return self.q * (2 + 2 * self.context.team) if is_needed else 0.0

    def _keys_joined(self) -> float:
        is_startrail = isinstance(self.context.schedule, StarTrail)
        return 2 * self.context.team * self.kv if is_startrail else 0.0
