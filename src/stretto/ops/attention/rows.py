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

_OF_KEYS = ("k", "v", "dk", "dv")


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


def heads_exchanged(
    job: Job, move: Move, tensors: dict[str, Tensor], *groups: tuple[str, ...]
) -> Pending[list[Block]]:
    """Own rows with all heads, (L, B, heads, ...), as blocks of more rows with a share of them.

    Under way when it returns. A block for each group of names; none stands for all in one.
    """
    groups = groups or (tuple(tensors),)
    own, rows = _rows_of(job, move.tensors[0])

    def share(rank: int) -> dict[str, Tensor]:
        return {n: x[:, :, slice(*_heads_of(job, rank, n))] for n, x in tensors.items()}

    sends = {peer: Block.of(own, share(peer)) for peer in move.sends}
    mine = share(job.schedule.case.rank % job.schedule.context.ulysses)
    specs = {name: (tuple(x.shape[1:]), x.dtype) for name, x in mine.items()}
    coming = job.start(move, sends, specs)
    wholes = [Block.empty(rows, {n: specs[n] for n in names}, job.device) for names in groups]
    for whole in wholes:
        whole.take(own, {n: mine[n] for n in whole.parts})

    def arrived() -> list[Block]:
        for block in coming.wait().values():
            for whole in wholes:
                whole.take(block.rows, {n: block[n] for n in whole.parts})
        return wholes

    return Pending(arrived)


def heads_home(job: Job, move: Move, block: Block) -> Pending[dict[str, Tensor]]:
    """A share of heads of more rows, as own rows with all heads, (L, B, heads, ...) by name.

    Under way when it returns. Where ranks outnumber key heads, several hold parts of one head's
    gradient: they are summed, in order of rank.
    """
    own, _ = _rows_of(job, move.tensors[0])
    coming = job.hand(move, block)
    here = job.schedule.case.rank % job.schedule.context.ulysses

    def arrived() -> dict[str, Tensor]:
        shares = coming.wait() | {here: block}
        return {
            name: _all_heads(job, own, dict(sorted(shares.items())), name) for name in block.parts
        }

    return Pending(arrived)


def _rows_of(job: Job, name: str) -> tuple[Spans, Spans]:
    """Own rows of a tensor, and those of all Ulysses ranks."""
    case, plan = job.schedule.case, job.schedule
    if name in _OF_KEYS:
        return case.kv_rows[case.rank], plan.kv
    return case.q_rows[case.rank], plan.q


def _heads_of(job: Job, rank: int, name: str) -> tuple[int, int]:
    """First and end head of a Ulysses rank's share of a tensor."""
    case, u = job.schedule.case, job.schedule.context.ulysses
    if name not in _OF_KEYS:
        return rank * case.heads_q // u, (rank + 1) * case.heads_q // u
    first = rank * case.heads_kv // u
    return first, first + kv_heads(case, u)


def _all_heads(job: Job, own: Spans, shares: dict[int, Block], name: str) -> Tensor:
    """Own rows of every rank's share of the heads, beside one another; shared ones are summed."""
    case, sample = job.schedule.case, shares[0][name]
    is_shared = name in _OF_KEYS and job.schedule.context.ulysses > case.heads_kv
    heads = case.heads_kv if name in _OF_KEYS else case.heads_q
    shape = (own.rows, sample.shape[1], heads, *sample.shape[3:])
    if not is_shared:
        whole = sample.new_empty(shape)
        for rank, share in shares.items():
            share.give(own, name, whole[:, :, slice(*_heads_of(job, rank, name))])
        return whole
    total = torch.zeros(shape, dtype=job.wide, device=job.device)
    for rank, share in shares.items():
        total[:, :, slice(*_heads_of(job, rank, name))].add_(share.select(own)[name])
    return total.to(job.dtype)
