"""What a rank of an attention call works with: shapes, kernels, and exchanges of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stretto.mesh.mesh import Mesh, Pending
from stretto.ops.attention.backends import Backend
from stretto.ops.attention.block import Block, Specs
from stretto.ops.attention.naive import wide_dtype
from stretto.plan.column import grad_wire, kv_heads
from stretto.plan.moves import Move
from stretto.plan.ranges import Spans
from stretto.plan.schedule import Schedule

_QUERY_SIDE = ("q", "out", "dout", "dq")


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank works with: the schedule, the mesh that carries it out, the kernels."""

    schedule: Schedule
    mesh: Mesh | None
    backend: Backend
    scale: float
    dtype: torch.dtype
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.dtype)

    @property
    def wire(self) -> torch.dtype:
        """In which dK and dV travel to their owners."""
        return self.wide if grad_wire(self.schedule.context) == "float32" else self.dtype

    def specs(self, *names: str, **dtypes: torch.dtype) -> Specs:
        """Rows of these tensors on a rank that holds its share of the heads."""
        case, u = self.schedule.case, self.schedule.context.ulysses
        heads, groups = case.heads_q // u, kv_heads(case, u)
        found = {}
        for name in names:
            shape = (case.batch, heads if name in _QUERY_SIDE else groups, case.head_dim)
            plain = self.dtype
            if name in ("lse", "delta"):
                shape, plain = (case.batch, heads), self.wide
            found[name] = (shape, dtypes.get(name, plain))
        return found

    def sums(self, rows: Spans, *names: str) -> Block:
        """Sums that hold nothing yet, in float32 (float64 for float64)."""
        sums = self.space(rows, *names)
        sums.buffer.zero_()
        return sums

    def space(self, rows: Spans, *names: str) -> Block:
        """Memory for such sums, which holds anything."""
        return Block.empty(rows, self.specs(*names, **dict.fromkeys(names, self.wide)), self.device)

    def start(self, move: Move, sends: dict[int, Block], specs: Specs) -> Arrival:
        """Begin an exchange; the result is waited for later."""
        assert self.mesh is not None, "one rank has nobody to talk to"
        incoming = {p: Block.empty(rows, specs, self.device) for p, rows in move.receives.items()}
        pending = self.mesh.exchange(
            {p: block.buffer for p, block in sends.items()},
            {p: block.buffer for p, block in incoming.items()},
            move.axis,
            move.phase,
            verb=move.verb,
            channel=move.channel,
        )
        return Arrival(pending, incoming, sends)

    def hand(self, move: Move, block: Block) -> Arrival:
        """Begin an exchange that sends everyone rows of one block, as the move names them."""
        sends = {p: block.select(rows).packed() for p, rows in move.sends.items()}
        return self.start(move, sends, block.specs)


@dataclass(frozen=True, slots=True)
class Arrival:
    """An exchange under way. Holds on to what is being sent until it has left."""

    pending: Pending
    incoming: dict[int, Block]
    leaving: dict[int, Block]

    def wait(self) -> dict[int, Block]:
        self.pending.wait()
        self.leaving.clear()
        return self.incoming

    def one(self) -> Block:
        """What the only sender sent."""
        (block,) = self.wait().values()
        return block
