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
from stretto.plan.ranges import Spans


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
    block = block.packed()
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
    if not moves and of_keys:
        return Pending(lambda: Block.of(own, tensors))
    if not moves:
        # Unlike keys they rarely travel, and lie as the walk takes them after most projections.
        return Pending(lambda: Block.resting(own, {n: x.contiguous() for n, x in tensors.items()}))
    (move,) = moves

    def share(rank: int) -> dict[str, Tensor]:
        first, end = _heads_of(job, rank, keys=of_keys)
        return {name: tensor[:, :, first:end] for name, tensor in tensors.items()}

    sends = {peer: Block.of(own, share(peer)) for peer in move.sends}
    mine = share(case.rank % context.ulysses)
    specs = {name: (tuple(x.shape[1:]), x.dtype) for name, x in mine.items()}
    coming = job.start(move, sends, specs)
    whole = Block.empty(job.schedule.kv if of_keys else job.schedule.q, specs, job.device)
    whole.take(own, mine)

    def arrived() -> Block:
        for block in coming.wait().values():
            whole.take(block.rows, block.parts)
        return whole

    return Pending(arrived)


def heads_home(job: Job, move: Move, block: Block) -> Pending[dict[str, Tensor]]:
    """A share of heads of more rows, as own rows with all heads, (L, B, heads, ...) by name.

    Under way when it returns.
    """
    case, context = job.schedule.case, job.schedule.context
    keys = move.tensors[0] == "dk"
    own = (case.kv_rows if keys else case.q_rows)[case.rank]
    coming = job.hand(move, block)
    # Where ranks outnumber key heads, several hold parts of one head's sum.
    join = _overlaid if keys and context.ulysses > case.heads_kv else _side_by_side

    def arrived() -> dict[str, Tensor]:
        shares = coming.wait() | {case.rank % context.ulysses: block}
        return {name: join(job, own, dict(sorted(shares.items())), name) for name in block.parts}

    return Pending(arrived)


def _heads_of(job: Job, rank: int, *, keys: bool) -> tuple[int, int]:
    """First and end head of a Ulysses rank's share."""
    case, u = job.schedule.case, job.schedule.context.ulysses
    if not keys:
        return rank * case.heads_q // u, (rank + 1) * case.heads_q // u
    first = rank * case.heads_kv // u
    return first, first + kv_heads(case, u)


def _side_by_side(job: Job, own: Spans, shares: dict[int, Block], name: str) -> Tensor:
    """Own rows of every rank's share of the heads, beside one another."""
    sample = shares[0][name]
    heads = sum(share[name].shape[2] for share in shares.values())
    whole = sample.new_empty((own.rows, sample.shape[1], heads, *sample.shape[3:]))
    first = 0
    for share in shares.values():
        end = first + share[name].shape[2]
        share.give(own, name, whole[:, :, first:end])
        first = end
    return whole


def _overlaid(job: Job, own: Spans, shares: dict[int, Block], name: str) -> Tensor:
    """The same with heads that several hold summed, in wide dtype, in order of rank."""
    sample, heads = shares[0][name], job.schedule.case.heads_kv
    shape = (own.rows, sample.shape[1], heads, *sample.shape[3:])
    total = torch.zeros(shape, dtype=job.wide, device=job.device)
    for rank, share in shares.items():
        first, end = _heads_of(job, rank, keys=True)
        total[:, :, first:end].add_(share.select(own)[name])
    return total.to(job.dtype)
