"""One rank's part of an attention call: the schedule carried out, forward and backward.

    B batch   H query heads   G key/value heads   L rows here   D head dim

Plain functions on tensors, without autograd: virtual ranks in threads call them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stretto.mesh.mesh import Mesh, Pending
from stretto.ops.attention import backends
from stretto.ops.attention.backends import Backend
from stretto.ops.attention.block import Block, Specs, zeros
from stretto.ops.attention.merge import accumulators, merge_
from stretto.ops.attention.naive import wide_dtype
from stretto.plan.column import grad_wire, kv_heads, union
from stretto.plan.context import AttentionCase, Context
from stretto.plan.moves import Move, Pass, Step, Turn
from stretto.plan.ranges import Spans
from stretto.plan.schedule import Schedule, schedule

_QUERY_SIDE = ("q", "out", "dout", "dq")


@dataclass(slots=True)
class Saved:
    """What backward needs of forward.

    `q`, `kv`: after the exchange of heads, storage order. `out`: (B, H, L, D) as returned. `lse`:
    of q's rows. `kept`: blocks that the schedule keeps, in order of the walk.
    """

    job: Job
    q: Block
    kv: Block
    out: Tensor
    lse: Tensor
    kept: list[Block] = field(default_factory=list)


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
        sends = {p: block.select(rows) for p, rows in move.sends.items()}
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


def forward_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh | None,
    context: Context,
    case: AttentionCase,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Saved]:
    """This rank's attention over the whole sequence.

    q is (B, H, L, D), k and v are (B, G, Lk, D): the rows that `case` gives rank `case.rank`.
    Returns out like q, lse (B, H, L) or None unless the case asks for it, and what backward needs.
    """
    job = Job(
        schedule(context, case),
        mesh,
        backends.choose(q.device, q.dtype, q.shape[-1], backend),
        q.shape[-1] ** -0.5 if scale is None else scale,
        q.dtype,
        q.device,
    )
    with torch.no_grad():
        return _forward(job, q, k, v)


def backward_rank(dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, for dout like out. Moves what the schedule's backward says."""
    with torch.no_grad():
        return _backward(saved.job, dout, saved)


# ---- forward ---------------------------------------------------------------------------------


def _forward(job: Job, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, Saved]:
    plan = job.schedule.forward
    moves = list(plan.before)
    own_q = heads_exchanged(job, _taken(moves, "heads", 1), {"q": rows_first(q)})
    own_kv = heads_exchanged(
        job, _taken(moves, "heads", 1), {"k": rows_first(k), "v": rows_first(v)}
    )
    kept: list[Block] = []
    walk = Walk(job, plan, kept)
    rows = Gathering(job, moves, own_q)
    walk.begin(_keys_gathered(job, moves, own_kv))
    team_q = rows.finish()
    out, lse = _attend(walk, team_q)
    moves = list(plan.after)
    out, lse = _merged(job, _taken(moves, "row-out"), team_q.rows, out, lse)
    home, home_lse = _out_home(job, moves, out.to(job.dtype), lse)
    result = public(home)
    saved = Saved(job, own_q, own_kv, result, lse, kept)
    return result, None if home_lse is None else public(home_lse), saved


def _taken(moves: list[Move], phase: str, count: int | None = None) -> list[Move]:
    """Remove the leading moves of a phase, at most `count`."""
    taken = []
    while moves and moves[0].phase == phase and (count is None or len(taken) < count):
        taken.append(moves.pop(0))
    return taken


def _keys_gathered(job: Job, moves: list[Move], kv: Block) -> Block:
    """The keys that the walk begins with: one's own, or those that StarTrail places here."""
    of_keys = [move for move in moves if move.verb == "all_gather" and move.tensors[0] == "k"]
    kv = team_gathered(job, of_keys, kv)
    for move in moves:
        if move.verb == "permute" and move.sends:
            kv = job.hand(move, kv).one()
    return kv


def _attend(walk: Walk, q: Block) -> tuple[Tensor, Tensor]:
    """Attention of the team's queries over all blocks of the walk, partial results merged."""
    job = walk.job
    steps = list(job.schedule.forward.steps)
    if len(steps) == 1:
        ((_, block),) = walk
        return backends.attend(
            q["q"], block["k"], block["v"], steps[0].pieces, job.scale, job.backend
        )
    acc, acc_lse = accumulators(q["q"])
    for step, block in walk:
        keys = block["k"], block["v"]
        backends.attend_(acc, acc_lse, q["q"], *keys, step.pieces, job.scale, job.backend)
    return acc, acc_lse


def _merged(
    job: Job, moves: list[Move], rows: Spans, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Partial outputs of the team's rows to their owners, merged there in order of rank."""
    for move in moves:
        held = Block.of(rows, {"out": out, "lse": lse}, out=out.dtype)
        own = next(iter(move.receives.values()))
        sends = {p: held.select(part).cast(job.dtype, "out") for p, part in move.sends.items()}
        parts = job.start(move, sends, job.specs("out", "lse")).wait()
        assert job.mesh is not None, "one rank merges nothing"
        parts[job.mesh.rank(move.axis)] = held.select(own)
        mine = Block.empty(own, job.specs("q"), job.device)
        out, lse = accumulators(mine["q"])
        for position in sorted(parts):
            merge_(out, lse, parts[position]["out"], parts[position]["lse"])
        rows = own
    return out, lse


def _out_home(
    job: Job, moves: list[Move], out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor | None]:
    """This rank's rows with all heads: out (L, B, H, D), and lse (L, B, H) when asked for."""
    case = job.schedule.case
    if not moves:
        return out, lse if case.return_lse else None
    (move,) = moves
    held = {"out": out, "lse": lse}
    block = Block.of(job.schedule.q, {name: held[name] for name in move.tensors})
    parts = heads_home(job, move, block)
    return _side_by_side(parts, "out"), _side_by_side(parts, "lse") if case.return_lse else None


# ---- backward --------------------------------------------------------------------------------


def _backward(job: Job, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    plan = job.schedule.backward
    moves = list(plan.before)
    dout_LBHD = rows_first(dout).contiguous()
    delta = backends.delta(dout_LBHD, rows_first(saved.out).contiguous())
    came = heads_exchanged(job, _taken(moves, "back-heads"), {"dout": dout_LBHD, "delta": delta})
    known = {"q": saved.q["q"], "lse": saved.lse, "dout": came["dout"], "delta": came["delta"]}
    own = Block(saved.q.rows, saved.q.buffer, known)
    if plan.moving == "q" or any("dout" in move.tensors for move in moves):
        own = Block.of(saved.q.rows, known)
    rows, walk = Gathering(job, moves, own), Walk(job, plan, list(saved.kept))
    first = _keys_gathered(job, moves, saved.kv)
    if plan.moving == "q":
        walk.begin(rows.finish())
        rests = saved.kept[0] if job.schedule.forward.turns[0].steps[0].kept else first
        dq, sums = _backward_moving_queries(walk, rests)
    else:
        walk.begin(first)
        dq, sums = _backward_moving_keys(walk, rows.finish())
    return _gradients_home(job, list(plan.after), dq, sums)


def _backward_moving_keys(walk: Walk, queries: Block) -> tuple[Block, Block]:
    """dQ of the team's rows, and the sums of dK and dV that ended up with this rank."""
    job = walk.job
    stand_in = backends.surrogate(queries["dout"], queries["delta"])
    dq = _sums(job, queries.rows, "dq")
    returning = _returning(job, walk.plan)
    for step, block in walk:
        part = _sums(job, block.rows, "dk", "dv")
        backends.attend_backward_(
            (dq["dq"], part["dk"], part["dv"]),
            queries["dout"],
            queries["q"],
            block["k"],
            block["v"],
            stand_in,
            queries["lse"],
            step.pieces,
            job.scale,
            job.backend,
        )
        returning.add(step, part)
    return dq, returning.home()


def _backward_moving_queries(walk: Walk, keys: Block) -> tuple[Block, Block]:
    """The same with keys and their sums at rest, queries passing by and dQ riding with them."""
    job = walk.job
    sums = _sums(job, keys.rows, "dk", "dv")
    riding = Riding(job)
    for step, block in walk:
        part = _sums(job, block.rows, "dq")
        backends.attend_backward_(
            (part["dq"], sums["dk"], sums["dv"]),
            block["dout"],
            block["q"],
            keys["k"],
            keys["v"],
            backends.surrogate(block["dout"], block["delta"]),
            block["lse"],
            step.pieces,
            job.scale,
            job.backend,
        )
        riding.add(step, part)
    return riding.home(), sums


def _gradients_home(
    job: Job, moves: list[Move], dq: Block, sums: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the team's rows to their owners, then heads home: dq, dk, dv as the caller's."""
    dq = summed(job, _taken(moves, "back-row-out"), dq)
    for move in _taken(moves, "back-owner"):
        if move.verb == "permute":
            gone = job.hand(move, sums.cast(job.wire)).one() if move.sends else sums
            sums = gone.cast(job.wide)
        else:
            sums = summed(job, [move], sums)
    dq, sums = dq.cast(job.dtype), sums.cast(job.dtype)
    if not moves:
        return public(dq["dq"]), public(sums["dk"]), public(sums["dv"])
    of_q, of_kv = moves
    dq_parts, kv_parts = heads_home(job, of_q, dq), heads_home(job, of_kv, sums)
    grads = (
        _side_by_side(dq_parts, "dq"),
        _overlaid(job, kv_parts, "dk"),
        _overlaid(job, kv_parts, "dv"),
    )
    return public(grads[0]), public(grads[1]), public(grads[2])


def _sums(job: Job, rows: Spans, *names: str) -> Block:
    return zeros(rows, job.specs(*names, **dict.fromkeys(names, job.wide)), job.device)


# ---- gradients of keys and values --------------------------------------------------------------


def _returning(job: Job, plan: Pass) -> Riding | Owners | AtOnce:
    if plan.ride:
        return Riding(job)
    if job.schedule.context.schedule.kind == "gather":
        return AtOnce(job)
    return Owners(job, plan)


class Riding:
    """Gradients that travel on with their block: a rank adds its part to what came with it."""

    def __init__(self, job: Job):
        self.job = job
        self.coming: Arrival | None = None
        self.sum: Block | None = None

    def add(self, step: Step, part: Block) -> None:
        rows = next(iter(step.give.sends.values())) if step.give else part.rows
        if rows != part.rows:  # pruned keys: gradients ride with all rows
            whole = _sums(self.job, rows, *part.parts)
            whole.add_(part)
            part = whole
        if self.coming is not None:
            part.add_(self.coming.one())
        self.sum = part
        if step.give:
            wire = self.job.wire if step.give.tensors[0] == "dk" else self.job.dtype
            self.coming = self.job.hand(step.give, part.cast(wire))

    def home(self) -> Block:
        """The sum of this rank's own block, back from its round."""
        if self.coming is not None:
            return self.coming.one().cast(self.job.wide)
        assert self.sum is not None, "a walk has steps"
        return self.sum


class AtOnce:
    """Gradients of all blocks, computed in one step, to all owners in one exchange."""

    def __init__(self, job: Job):
        self.job = job
        self.sum: Block | None = None

    def add(self, step: Step, part: Block) -> None:
        own = self.job.schedule.kv
        self.sum = part.select(own)
        if step.give:
            self.sum = summed(self.job, [step.give], part)

    def home(self) -> Block:
        assert self.sum is not None, "a walk has steps"
        return self.sum


class Owners:
    """Gradients straight to their owners, who add them in order of delivery, their own first.

    On two levels the parts of one circle meet at a delegate, who sends their sum on. Messages are
    in flight under the next step or circle.
    """

    def __init__(self, job: Job, plan: Pass):
        self.job = job
        self.sums: Block | None = None
        self.turns = iter(plan.turns)
        self.left = 0
        self.circle: Block | None = None
        self.inner: Arrival | None = None
        self.outer: Arrival | None = None

    def add(self, step: Step, part: Block) -> None:
        if not self.left:
            self.turn = next(self.turns)
            self.left = len(self.turn.steps)
            self.circle = self._begun(part)
        elif step.give:
            self._collect_inner()
            self.inner = self.job.hand(step.give, part.cast(self.job.wire))
        self.left -= 1
        if not self.left:
            self._collect_inner()
            self._end_circle()

    def home(self) -> Block:
        self._collect_outer()
        assert self.sums is not None, "a walk has turns"
        return self.sums

    def _begun(self, part: Block) -> Block:
        """The sum for the block that this rank is delegate of on this circle."""
        give = self.turn.give
        rows = next(iter(give.sends.values())) if give else self.job.schedule.kv
        if rows == part.rows:
            return part
        sums = _sums(self.job, rows, "dk", "dv")
        sums.add_(part.among(rows))
        return sums

    def _collect_inner(self) -> None:
        if self.inner is not None:
            assert self.circle is not None, "a circle has begun"
            self.circle.add_(self.inner.one())
            self.inner = None

    def _collect_outer(self) -> None:
        if self.outer is not None:
            assert self.sums is not None, "a rank's own circle comes first"
            self.sums.add_(self.outer.one())
            self.outer = None

    def _end_circle(self) -> None:
        assert self.circle is not None, "a circle has begun"
        if self.turn.give is None:
            self.sums = self.circle
            return
        self._collect_outer()
        self.outer = self.job.hand(self.turn.give, self.circle.cast(self.job.wire))


# ---- rows and heads ----------------------------------------------------------------------------


class Walk:
    """Iterates over (step, block): blocks arrive while the one before is computed with."""

    def __init__(self, job: Job, plan: Pass, kept: list[Block]):
        self.job = job
        self.plan = plan
        self.kept = kept
        self.back = plan is job.schedule.backward
        self.block: Block | None = None
        self.crossing: Arrival | None = None
        self.coming: Arrival | None = None

    def begin(self, block: Block) -> None:
        """Set out with `block`, or what the schedule kept in its place; the next is on its way."""
        self.block = block
        self._enter(self.plan.turns[0])
        self._take(self.plan.turns[0].steps[0])

    def __iter__(self) -> Iterator[tuple[Step, Block]]:
        for turn in self.plan.turns:
            if turn is not self.plan.turns[0]:
                self._enter(turn)
            for step in turn.steps:
                if step is not self.plan.turns[0].steps[0]:
                    self._take(step)
                elif turn.hop and turn.hop.verb == "all_gather":
                    self._collect(step)
                assert self.block is not None, "a step has a block"
                self._keep(step, self.block)
                yield step, self.block
                self.block = self.coming.one() if self.coming else None
            if self.crossing:
                self.block = self.crossing.one()

    def _enter(self, turn: Turn) -> None:
        """Send on what the next turn begins with; with Gather, everything to everyone."""
        block, self.crossing = self._at(turn.steps[0]), None
        if turn.hop and turn.hop.verb == "shift":
            self.crossing = self.job.hand(turn.hop, block)
        elif turn.hop:
            sends = dict.fromkeys(turn.hop.sends, block)
            self.crossing = self.job.start(turn.hop, sends, block.specs)

    def _take(self, step: Step) -> None:
        """Make the step's block the one at hand, and send it on."""
        self.block = self._at(step)
        self.coming = self.job.hand(step.hop, self.block) if step.hop else None

    def _collect(self, step: Step) -> None:
        """The blocks of all ranks as one."""
        assert self.crossing is not None, "the exchange has begun"
        assert self.block is not None, "every rank has a block of its own"
        self.block = Block.joined(step.rows, [self.block, *self.crossing.wait().values()])
        self.crossing = None

    def _at(self, step: Step) -> Block:
        if step.kept and self.back and (self.block is None or self.block.rows != step.rows):
            return self.kept[0]
        assert self.block is not None, "no block came and none was kept"
        return self.block

    def _keep(self, step: Step, block: Block) -> None:
        if step.kept and self.back:
            self.kept.pop(0)
        elif step.kept:
            self.kept.append(block)


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


def heads_exchanged(job: Job, moves: list[Move], tensors: dict[str, Tensor]) -> Block:
    """Own rows with all heads, (L, B, heads, ...), as a block of more rows with a share of them.

    Without moves the block of one's own rows.
    """
    case, context = job.schedule.case, job.schedule.context
    of_keys = "k" in tensors
    own = (case.kv_rows if of_keys else case.q_rows)[case.rank]
    if not moves:
        return Block.of(own, tensors)
    (move,) = moves

    def share(rank: int) -> Block:
        first, end = _heads_of(job, rank, keys=of_keys)
        return Block.of(own, {name: tensor[:, :, first:end] for name, tensor in tensors.items()})

    sends = {peer: share(peer) for peer in move.sends}
    mine = share(case.rank % context.ulysses)
    arrived = job.start(move, sends, mine.specs).wait()
    rows = job.schedule.kv if of_keys else job.schedule.q
    return Block.joined(rows, [mine, *arrived.values()])


def heads_home(job: Job, move: Move, block: Block) -> dict[int, Block]:
    """A share of heads of more rows, as own rows by Ulysses rank, whose heads they are."""
    case, context = job.schedule.case, job.schedule.context
    own = (case.kv_rows if move.tensors[0] == "dk" else case.q_rows)[case.rank]
    parts = job.hand(move, block).wait()
    parts[case.rank % context.ulysses] = block.select(own)
    return parts


def _heads_of(job: Job, rank: int, *, keys: bool) -> tuple[int, int]:
    """First and end head of a Ulysses rank's share."""
    case, u = job.schedule.case, job.schedule.context.ulysses
    if not keys:
        return rank * case.heads_q // u, (rank + 1) * case.heads_q // u
    first = rank * case.heads_kv // u
    return first, first + kv_heads(case, u)


def _side_by_side(parts: dict[int, Block], name: str) -> Tensor:
    """(L, B, heads, ...) from every rank's share."""
    return torch.cat([parts[rank][name] for rank in sorted(parts)], dim=2)


def _overlaid(job: Job, parts: dict[int, Block], name: str) -> Tensor:
    """The same for keys: where ranks outnumber heads, several hold parts of one head's sum."""
    case = job.schedule.case
    sample = parts[0][name]
    shape = (*sample.shape[:2], case.heads_kv, sample.shape[3])
    total = torch.zeros(shape, dtype=job.wide, device=job.device)
    for rank in sorted(parts):
        first, end = _heads_of(job, rank, keys=True)
        total[:, :, first:end].add_(parts[rank][name])
    return total.to(job.dtype)


def rows_first(x_BHLD: Tensor) -> Tensor:
    """A view in storage order, (L, B, H, ...)."""
    return x_BHLD.movedim(2, 0)


def public(x_LBHD: Tensor) -> Tensor:
    """A view in torch SDPA's order, (B, H, L, ...)."""
    return x_LBHD.movedim(0, 2)


def with_mesh(saved: Saved, mesh: Mesh) -> Saved:
    """The same, to be continued on another view of the mesh (a counting one, for example)."""
    return replace(saved, job=replace(saved.job, mesh=mesh))
