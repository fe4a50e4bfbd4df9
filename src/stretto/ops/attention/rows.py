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


def own_heads(job: Job, *names: str) -> dict[str, Tensor]:
    """Memory for own rows with all heads, (L, B, heads, ...) by name."""
    case, keys = job.schedule.case, names[0] in _OF_KEYS
    rows = (case.kv_rows if keys else case.q_rows)[case.rank].rows
    heads = case.heads_kv if keys else case.heads_q
    return {
        name: torch.empty((rows, batch, heads, *rest), dtype=dtype, device=job.device)
        for name, ((batch, _, *rest), dtype) in job.specs(*names).items()
    }


def heads_home(
    job: Job, move: Move, block: Block, into: dict[str, Tensor] | None = None
) -> Pending[dict[str, Tensor]]:
    """A share of heads of more rows, as own rows with all heads, (L, B, heads, ...) by name.

    Under way when it returns. `into`: memory of `own_heads`, shared by several shares.
    """
    case, context = job.schedule.case, job.schedule.context
    keys, here = move.tensors[0] in _OF_KEYS, case.rank % context.ulysses
    own = (case.kv_rows if keys else case.q_rows)[case.rank]
    coming = job.hand(move, block)
    if keys and context.ulysses > case.heads_kv:
        return Pending(lambda: _overlaid(job, own, coming.wait() | {here: block}))
    whole = own_heads(job, *move.tensors) if into is None else into
    _place(job, whole, own, here, block)

    def arrived() -> dict[str, Tensor]:
        for rank, share in coming.wait().items():
            _place(job, whole, own, rank, share)
        return whole

    return Pending(arrived)


def _place(job: Job, whole: dict[str, Tensor], own: Spans, rank: int, share: Block) -> None:
    """A rank's heads of own rows to where they belong."""
    for name in share.parts:
        first, end = _heads_of(job, rank, keys=name in _OF_KEYS)
        share.give(own, name, whole[name][:, :, first:end])


def _heads_of(job: Job, rank: int, *, keys: bool) -> tuple[int, int]:
    """First and end head of a Ulysses rank's share, or of the job's part of it."""
    case, u = job.schedule.case, job.schedule.context.ulysses
    first, count = rank * case.heads_q // u, case.heads_q // u
    if keys:
        first, count = rank * case.heads_kv // u, kv_heads(case, u)
    part, parts = job.part
    return first + part * count // parts, first + (part + 1) * count // parts


def _overlaid(job: Job, own: Spans, shares: dict[int, Block]) -> dict[str, Tensor]:
    """Gradients of keys where ranks outnumber key heads: several hold parts of one head's sum.

    Added in wide dtype, in order of rank.
    """
    found = {}
    for name, like in own_heads(job, *shares[0].parts).items():
        total = torch.zeros_like(like, dtype=job.wide)
        for rank in sorted(shares):
            first, end = _heads_of(job, rank, keys=True)
            total[:, :, first:end].add_(shares[rank].select(own)[name])
        found[name] = total.to(job.dtype)
    return found
