"""Rows over a team and heads over Ulysses ranks: gathered before the walk, brought home after.

B batch   L rows   D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.mesh.mesh import Pending
from stretto.ops.attention.block import Block
from stretto.ops.attention.job import Arrival, Job
from stretto.plan.column import kv_heads, union
from stretto.plan.moves import Move


class Gathering:
    """Queries, with what goes along, of the whole team: the first level is under way at once."""

    def __init__(self, job: Job, moves: list[Move], block: Block):
        self.job = job
        self.moves = [m for m in moves if m.verb == "all_gather" and m.tensors[0] == "q"]
        self.block = block
        self.coming = _spread(job, self.moves[0], block) if self.moves else None

    def finish(self) -> Block:
        if self.coming is None:
            return self.block
        block = _with(self.block, self.coming)
        return team_gathered(self.job, self.moves[1:], block)


def team_gathered(job: Job, moves: list[Move], block: Block) -> Block:
    """The rows of the whole team, level by level."""
    for move in moves:
        block = _with(block, _spread(job, move, block))
    return block


def _spread(job: Job, move: Move, block: Block) -> Arrival:
    """A block to all peers of an axis, and theirs here."""
    return job.start(move, dict.fromkeys(move.sends, block), block.specs)


def _with(block: Block, coming: Arrival) -> Block:
    blocks = [block, *coming.wait().values()]
    return Block.joined(union(part.rows for part in blocks), blocks)


def placed(job: Job, move: Move, block: Block, *, wire: torch.dtype | None = None) -> Block:
    """What StarTrail's transpose brings here; on ranks that it leaves alone, the block itself.

    Those take part too, with no message: a communicator is made by all ranks of an axis.
    """
    coming = job.hand(move, block.cast(wire) if wire and move.sends else block)
    (brought,) = coming.wait().values() or (block,)
    return brought


def summed(job: Job, moves: list[Move], block: Block) -> Block:
    """Sums of more rows than this rank's to their owners, added there, the owner's own first."""
    for move in moves:
        own = next(iter(move.receives.values()))
        wire = job.wire if "dk" in block.parts else job.dtype
        parts = job.hand(move, block.cast(wire)).wait()
        assert job.mesh is not None, "one rank sums nothing"
        here, size = job.mesh.rank(move.axis), len(parts) + 1
        block = block.select(own)
        for distance in range(1, size):
            block.add_(parts[(here - distance) % size])
    return block


def heads_exchanged(job: Job, moves: list[Move], tensors: dict[str, Tensor]) -> Pending[Block]:
    """Own rows with all heads, (L, B, heads, ...), as a block of more rows with a share of them.

    Under way when it returns. Without moves the block of one's own rows.
    """
    case, context = job.schedule.case, job.schedule.context
    of_keys = "k" in tensors
    own = (case.kv_rows if of_keys else case.q_rows)[case.rank]
    if not moves:
        return Pending(lambda: Block.of(own, tensors))
    (move,) = moves

    def share(rank: int) -> Block:
        first, end = _heads_of(job, rank, keys=of_keys)
        return Block.of(own, {name: tensor[:, :, first:end] for name, tensor in tensors.items()})

    sends = {peer: share(peer) for peer in move.sends}
    mine = share(case.rank % context.ulysses)
    coming = job.start(move, sends, mine.specs)
    rows = job.schedule.kv if of_keys else job.schedule.q
    return Pending(lambda: Block.joined(rows, [mine, *coming.wait().values()]))


def heads_home(job: Job, move: Move, block: Block) -> Pending[dict[int, Block]]:
    """A share of heads of more rows, as own rows by Ulysses rank, whose heads they are.

    Under way when it returns.
    """
    case, context = job.schedule.case, job.schedule.context
    own = (case.kv_rows if move.tensors[0] == "dk" else case.q_rows)[case.rank]
    coming = job.hand(move, block)
    mine = {case.rank % context.ulysses: block.select(own)}
    return Pending(lambda: coming.wait() | mine)


def _heads_of(job: Job, rank: int, *, keys: bool) -> tuple[int, int]:
    """First and end head of a Ulysses rank's share."""
    case, u = job.schedule.case, job.schedule.context.ulysses
    if not keys:
        return rank * case.heads_q // u, (rank + 1) * case.heads_q // u
    first = rank * case.heads_kv // u
    return first, first + kv_heads(case, u)


def side_by_side(parts: dict[int, Block], name: str) -> Tensor:
    """(L, B, heads, ...) from every rank's share."""
    return torch.cat([parts[rank][name] for rank in sorted(parts)], dim=2)


def overlaid(job: Job, parts: dict[int, Block], name: str) -> Tensor:
    """The same for keys: where ranks outnumber heads, several hold parts of one head's sum."""
    case = job.schedule.case
    sample = parts[0][name]
    shape = (*sample.shape[:2], case.heads_kv, sample.shape[3])
    total = torch.zeros(shape, dtype=job.wide, device=job.device)
    for rank in sorted(parts):
        first, end = _heads_of(job, rank, keys=True)
        total[:, :, first:end].add_(parts[rank][name])
    return total.to(job.dtype)
