"""One rank's part of an attention call: the schedule carried out, forward and backward.

    B batch   H query heads   G key/value heads   L rows here   D head dim

Plain functions on tensors, without autograd: virtual ranks in threads call them as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from stretto.mesh.mesh import Mesh
from stretto.ops.attention import backends, single
from stretto.ops.attention.block import Block
from stretto.ops.attention.job import Job
from stretto.ops.attention.merge import accumulators, merge_
from stretto.ops.attention.returning import Riding, returning
from stretto.ops.attention.rows import (
    Gathering,
    heads_exchanged,
    heads_home,
    placed,
    summed,
    team_gathered,
)
from stretto.ops.attention.single import Single
from stretto.ops.attention.walk import Walk
from stretto.plan.context import AttentionCase, Context
from stretto.plan.moves import Move
from stretto.plan.ranges import Spans
from stretto.plan.schedule import schedule


@dataclass(slots=True)
class SavedBlocks:
    """What backward needs of forward where rows or heads are split, or pieces are many.

    `q`, `kv`: after the exchange of heads, storage order. `out`: (B, H, L, D) as returned. `lse`:
    of q's rows. `kept`: blocks that the schedule keeps, in order of the walk.
    """

    job: Job
    q: Block
    kv: Block
    out: Tensor
    lse: Tensor
    kept: list[Block] = field(default_factory=list)

    def apart(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], SavedBlocks]]:
        """Its tensors, and what makes it of them again, which holds none."""
        tensors, frames = [self.out, self.lse], []
        for block in (self.q, self.kv, *self.kept):
            own, again = block.apart()
            tensors += own
            frames.append((len(own), again))
        return tensors, partial(_together, self.job, frames)


#: What backward needs of forward.
Saved = SavedBlocks | Single


def _together(
    job: Job, frames: list[tuple[int, Callable]], tensors: Sequence[Tensor]
) -> SavedBlocks:
    out, lse, *others = tensors
    left = iter(others)
    q, kv, *kept = (again(list(islice(left, count))) for count, again in frames)
    return SavedBlocks(job, q, kv, out, lse, kept)


def forward_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh | None,
    context: Context,
    case: AttentionCase,
    scale: float | None = None,
    backend: str | backends.Backend = "auto",
) -> tuple[Tensor, Tensor | None, Saved]:
    """This rank's attention over the whole sequence.

    q is (B, H, L, D), k and v are (B, G, Lk, D): the rows that `case` gives rank `case.rank`.
    Returns out like q, lse (B, H, L) or None unless the case asks for it, and what backward needs,
    which is the tensors themselves where one kernel on them is all there is to do.
    """
    job = Job(
        schedule(context, case),
        mesh,
        backends.choose(q.device, q.dtype, q.shape[-1], backend),
        q.shape[-1] ** -0.5 if scale is None else scale,
        q.dtype,
        q.device,
    )
    with _plain(q.device):
        if not (single.is_single(job.schedule) and single.takes(job.backend, q, k, v)):
            return _forward(job, q, k, v)
        saved = single.forward(job, q, k, v)
        return saved.out, public(saved.lse) if case.return_lse else None, saved


def backward_rank(dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, for dout like out. Moves what the schedule's backward says."""
    with _plain(dout.device):
        if isinstance(saved, Single):
            return single.backward(dout, saved)
        return _backward(saved.job, dout, saved)


@contextlib.contextmanager
def _plain(device: torch.device) -> Generator[None]:
    """Without autograd, and in the tensors' own dtypes: autocast would round statistics."""
    casts = torch.is_autocast_enabled(device.type)
    own = torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext()
    with torch.no_grad(), own:
        yield


# ---- forward ---------------------------------------------------------------------------------


def _forward(
    job: Job, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None, SavedBlocks]:
    plan = job.schedule.forward
    moves = list(plan.before)
    own_q, own_kv = _shares(job, _taken(moves, "heads"), q, k, v)
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
    saved = SavedBlocks(job, own_q, own_kv, result, lse, kept)
    return result, None if home_lse is None else public(home_lse), saved


def _shares(job: Job, moves: list[Move], q: Tensor, k: Tensor, v: Tensor) -> tuple[Block, Block]:
    """Queries, keys with values: more rows of a share of the heads, or all heads of own rows."""
    queries, keys = {"q": rows_first(q)}, {"k": rows_first(k), "v": rows_first(v)}
    if not moves:
        # Unlike keys they rarely travel, and lie as the walk takes them after most projections.
        own = Block.resting(job.schedule.q, {"q": queries["q"].contiguous()})
        return own, Block.of(job.schedule.kv, keys)
    if len(moves) == 1:
        both = heads_exchanged(job, moves[0], queries | keys, tuple(queries), tuple(keys))
        of_q, of_kv = both.wait()
        return of_q, of_kv
    coming = heads_exchanged(job, moves[0], queries), heads_exchanged(job, moves[1], keys)
    ((of_q,), (of_kv,)) = (pending.wait() for pending in coming)
    return of_q, of_kv


def _taken(moves: list[Move], phase: str) -> list[Move]:
    """Remove the leading moves of a phase."""
    taken = []
    while moves and moves[0].phase == phase:
        taken.append(moves.pop(0))
    return taken


def _keys_gathered(job: Job, moves: list[Move], kv: Block) -> Block:
    """The keys that the walk begins with: one's own, or those that StarTrail places here."""
    of_keys = [move for move in moves if move.verb == "all_gather" and move.tensors[0] == "k"]
    kv = team_gathered(job, of_keys, kv)
    for move in moves:
        if move.verb == "permute":
            kv = placed(job, move, kv)
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
    block = Block.resting(job.schedule.q, {name: held[name] for name in move.tensors})
    home = heads_home(job, move, block).wait()
    return home["out"], home.get("lse")


# ---- backward --------------------------------------------------------------------------------


def _backward(job: Job, dout: Tensor, saved: SavedBlocks) -> tuple[Tensor, Tensor, Tensor]:
    plan = job.schedule.backward
    moves = list(plan.before)
    own = _queries(job, moves, dout, saved, travel=plan.moving == "q")
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


def _queries(
    job: Job, moves: list[Move], dout: Tensor, saved: SavedBlocks, *, travel: bool
) -> Block:
    """What gradients need of own queries after the exchange of heads; see `_stand_in`."""
    heads = _taken(moves, "back-heads")
    dout_LBHD, out_LBHD = rows_first(dout).contiguous(), rows_first(saved.out).contiguous()
    known = {"q": saved.q["q"], "lse": saved.lse, "dout": dout_LBHD}
    travel = travel or any("dout" in move.tensors for move in moves)
    if not heads and not travel:
        return Block.resting(saved.q.rows, known | {"out": out_LBHD})
    known["delta"] = backends.delta(dout_LBHD, out_LBHD)
    if heads:
        (move,) = heads
        (came,) = heads_exchanged(job, move, {n: known[n] for n in ("dout", "delta")}).wait()
        known |= came.parts
    return Block.of(saved.q.rows, known) if travel else Block.resting(saved.q.rows, known)


def _stand_in(queries: Block) -> Tensor:
    """The output, where it is at hand; else what has the same sums with dO."""
    if "out" in queries.parts:
        return queries["out"]
    return backends.surrogate(queries["dout"], queries["delta"])


def _backward_moving_keys(walk: Walk, queries: Block) -> tuple[Block, Block]:
    """dQ of the team's rows, and the sums of dK and dV that ended up with this rank."""
    job = walk.job
    if _is_one_kernel(job):
        return _backward_at_once(walk, queries)
    # In storage order for all steps: of one step's forward it is as the kernel gave it.
    stand_in, lse = _stand_in(queries), queries["lse"].contiguous()
    dq = job.space(queries.rows, "dq")
    home = returning(job, walk.plan)
    for index, (step, block) in enumerate(walk):
        part = job.space(block.rows, "dk", "dv")
        backends.attend_backward_(
            (dq["dq"], part["dk"], part["dv"]),
            queries["dout"],
            queries["q"],
            block["k"],
            block["v"],
            stand_in,
            lse,
            step.pieces,
            job.scale,
            job.backend,
            begun=(index > 0, False, False),
        )
        home.add(step, part)
    return dq, home.home()


def _is_one_kernel(job: Job) -> bool:
    """Whether one call computes all there is, so that nothing needs to be summed."""
    context, plan = job.schedule.context, job.schedule
    (step, *more) = plan.backward.steps
    whole = ((0, plan.team_q.rows), (0, step.rows.rows))
    return (
        context.team == context.ring == 1
        and not more
        and [(piece.q, piece.k) for piece in step.pieces] == [whole]
    )


def _backward_at_once(walk: Walk, queries: Block) -> tuple[Block, Block]:
    """The kernel's own gradients, in the inputs' dtype."""
    ((step, keys),) = walk
    dq, dk, dv = backends.backward(
        queries["dout"],
        queries["q"],
        keys["k"],
        keys["v"],
        _stand_in(queries),
        queries["lse"],
        step.pieces[0].kind,
        walk.job.scale,
        walk.job.backend,
    )
    of_q = Block.resting(queries.rows, {"dq": dq})
    return of_q, Block.resting(keys.rows, {"dk": dk, "dv": dv})


def _backward_moving_queries(walk: Walk, keys: Block) -> tuple[Block, Block]:
    """The same with keys and their sums at rest, queries passing by and dQ riding with them."""
    job = walk.job
    sums = job.space(keys.rows, "dk", "dv")
    riding = Riding(job)
    for index, (step, block) in enumerate(walk):
        part = job.space(block.rows, "dq")
        backends.attend_backward_(
            (part["dq"], sums["dk"], sums["dv"]),
            block["dout"],
            block["q"],
            keys["k"],
            keys["v"],
            _stand_in(block),
            block["lse"],
            step.pieces,
            job.scale,
            job.backend,
            begun=(False, index > 0, index > 0),
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
            sums = placed(job, move, sums, wire=job.wire).cast(job.wide)
        else:
            sums = summed(job, [move], sums)
    dq, sums = dq.cast(job.dtype), sums.cast(job.dtype)
    if not moves:
        return public(dq["dq"]), public(sums["dk"]), public(sums["dv"])
    if len(moves) == 1:
        grads = heads_home(job, moves[0], Block.resting(dq.rows, dq.parts | sums.parts)).wait()
    else:
        coming = heads_home(job, moves[0], dq), heads_home(job, moves[1], sums)
        grads = coming[0].wait() | coming[1].wait()
    return public(grads["dq"]), public(grads["dk"]), public(grads["dv"])


def rows_first(x_BHLD: Tensor) -> Tensor:
    """A view in storage order, (L, B, H, ...)."""
    return x_BHLD.movedim(2, 0)


def public(x_LBHD: Tensor) -> Tensor:
    """A view in torch SDPA's order, (B, H, L, ...)."""
    return x_LBHD.movedim(0, 2)
