"""What every rank of an attention plan does: `schedule(context, case)` for rank `case.rank`.

Pure arithmetic on row sets, exact for uneven lengths, windows, documents and cross-attention.
`stretto.ops.attention` executes a `Schedule`, `Context.wire` counts it, `explain` prints it.

A rank's place: `ulysses` within its super-rank, `member` of its team, `turn` on the ring; the
super-rank, ring * team + member, holds the rows of its Ulysses ranks and a share of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from stretto.plan.column import (
    Call,
    Column,
    call_of,
    grad_wire,
    kv_heads,
    shift,
    union,
    walk,
)
from stretto.plan.moves import COLUMN, GRADIENTS, PASSES, ROWS, Move, Pass, Step, Turn
from stretto.plan.ranges import Spans
from stretto.plan.traffic import Traffic

if TYPE_CHECKING:
    from stretto.plan.context import AttentionCase, Context


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that one rank does in one attention call.

    `q`, `kv`: its rows after the exchange of heads. `team_q`: the rows whose queries it computes.
    """

    context: Context
    case: AttentionCase
    q: Spans
    kv: Spans
    team_q: Spans
    forward: Pass
    backward: Pass

    def moves(self, passes: Sequence[str] = PASSES) -> Iterator[Move]:
        for name in passes:
            yield from getattr(self, name).moves()

    def traffic(self, passes: Sequence[str] = PASSES) -> Traffic:
        """Bytes this rank sends, per phase, verb and axis."""
        traffic = Traffic()
        for move in self.moves(passes):
            traffic.add(move.phase, move.verb, move.axis, move.sent)
        return traffic

    def pair_count(self) -> int:
        """Visible (query, key) pairs that this rank computes, for each of its query heads."""
        return sum(step.pairs for step in self.forward.steps)

    def block_bytes(self) -> float:
        """Bytes of one block: the mean rank's queries."""
        case = self.case
        rows = sum(rows.rows for rows in case.q_rows) / len(case.q_rows)
        return case.batch * rows * case.heads_q * case.head_dim * case.item_bytes

    def peak_blocks(self, passes: Sequence[str] = PASSES) -> float:
        """Live memory of the busiest moment in blocks, beside the call's inputs and outputs."""
        return max(_peak(self.context, self.case, name) for name in passes)

    def explain(self) -> str:
        """Phases with bytes, blocks and messages of this rank, per axis, and peak memory."""
        lines = [f"{self.context.short()}, rank {self.case.rank} of {self.context.degree}"]
        for name in PASSES:
            lines += self._explained(name)
        return "\n".join(lines)

    def _explained(self, name: str) -> list[str]:
        block, rows = self.block_bytes() or 1.0, {}
        for move in self.moves((name,)):
            count, sent = rows.get((move.phase, move.verb, move.axis), (0, 0))
            rows[move.phase, move.verb, move.axis] = (count + move.messages, sent + move.sent)
        total = sum(sent for _, sent in rows.values())
        peak = self.peak_blocks((name,))
        yield_lines = [
            f"  {name}: {total} bytes sent = {total / block:.4g} blocks, "
            f"{len(list(getattr(self, name).steps))} steps, peak {peak:.4g} blocks"
        ]
        for (phase, verb, axis), (count, sent) in rows.items():
            what = f"{sent} bytes = {sent / block:.4g} blocks in {count} message(s)"
            yield_lines.append(f"    {phase:<15} {verb:<10} {axis:<9} {what}")
        return yield_lines


@lru_cache(maxsize=512)
def schedule(context: Context, case: AttentionCase) -> Schedule:
    """What rank `case.rank` does in this call, remembered. Raises as `build_schedule`."""
    return build_schedule(context, case)


def build_schedule(context: Context, case: AttentionCase) -> Schedule:
    """What rank `case.rank` does in this call, for who asks once, as over all of 1000 ranks.

    Raises PlanMismatch when heads do not fit.
    """
    context.check_heads(case.heads_q, case.heads_kv)
    call = call_of(context, case.at(0))
    place = _Place.of(context, case.rank)
    rows = (call.q[place.index], call.kv[place.index], call.team_q[place.turn])
    builder = _StarTrail if context.schedule.kind == "startrail" else _Tile
    build = builder(call, place)
    return Schedule(context, case, *rows, build.forward(), build.backward())


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank stands: position on the axes, and its super-rank's index."""

    rank: int
    ulysses: int
    member: int
    turn: int
    index: int

    @classmethod
    def of(cls, context: Context, rank: int) -> _Place:
        index, ulysses = divmod(rank, context.ulysses)
        turn, member = divmod(index, context.team)
        return cls(rank, ulysses, member, turn, index)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Schedules of the general tiling: ring, double ring, gather, tile, pass-q, Ulysses."""

    call: Call
    place: _Place

    @property
    def context(self) -> Context:
        return self.call.context

    def forward(self) -> Pass:
        before = self.heads_in()
        before += self.gather("row-q", "q")
        turns = self.walk("column", back=False)
        return Pass(tuple(before), turns, tuple(self.forward_out()))

    def backward(self) -> Pass:
        schedule = self.context.schedule
        before = [*self.heads("back-heads", "dout", "delta")]
        before += self.gather("back-row", "q", "dout", "lse", "delta")
        moves_q = schedule.kind == "ring" and schedule.circulate == "q"
        ride = schedule.kind == "ring" and (moves_q or schedule.gradients == "ride")
        if moves_q:
            turns = self.walk_queries(self.column(), "back-owner")
        else:
            turns = self.walk("back-column", back=True)
        after = [*self.reduce("back-row-out", "dq"), *self.backward_out()]
        return Pass(tuple(before), turns, tuple(after), "q" if moves_q else "kv", ride)

    # ---- heads -------------------------------------------------------------------------------

    def heads(self, phase: str, *tensors: str) -> list[Move]:
        """This rank's rows, a share of heads to each Ulysses peer; theirs for its own share."""
        own, peers = self._shards(tensors)
        sends = dict.fromkeys(peers, own)
        return self._all_to_all(phase, tensors, sends, peers)

    def heads_home(self, phase: str, *tensors: str) -> list[Move]:
        """The way back: the rows of every Ulysses peer, this rank's share of heads."""
        own, peers = self._shards(tensors)
        return self._all_to_all(phase, tensors, peers, dict.fromkeys(peers, own))

    def _all_to_all(self, phase, tensors, sends, receives) -> list[Move]:
        if self.context.ulysses == 1:
            return []
        row_bytes = self.call.row_bytes(*tensors)
        return [Move(phase, "all_to_all", "ulysses", tensors, sends, receives, row_bytes)]

    def _shards(self, tensors: Sequence[str]) -> tuple[Spans, dict[int, Spans]]:
        case, u = self.call.case, self.context.ulysses
        rows = case.kv_rows if tensors[0] in ("k", "dk") else case.q_rows
        first = self.place.index * u
        peers = {j: rows[first + j] for j in range(u) if j != self.place.ulysses}
        return rows[self.place.rank], peers

    def forward_out(self) -> list[Move]:
        out = ("out", "lse") if self.call.case.return_lse else ("out",)
        return [*self.reduce("row-out", "out", "lse"), *self.heads_home("heads-out", *out)]

    def heads_in(self) -> list[Move]:
        """Queries, keys and values before all else."""
        return [m for names in self._together("q", "k", "v") for m in self.heads("heads", *names)]

    def backward_out(self) -> list[Move]:
        groups, home = self._together("dq", "dk", "dv"), self.heads_home
        return [move for names in groups for move in home("back-heads-out", *names)]

    def _together(self, q: str, k: str, v: str) -> tuple[tuple[str, ...], ...]:
        """What travels as one message: all three where queries and keys lie on the same rows."""
        case = self.call.case
        return ((q, k, v),) if case.q_rows == case.kv_rows else ((q,), (k, v))

    # ---- rows --------------------------------------------------------------------------------

    def gather(self, phase: str, *tensors: str, kv: bool = False) -> list[Move]:
        """Rows of the whole team to every member: across nodes first, then fanned out inside."""
        moves = []
        for depth, (axis, size) in enumerate(self.context.levels("team")):
            # On the inner level a rank passes on what it got over the outer one.
            rows = [self._members_at(depth, position, kv=kv) for position in range(size)]
            here = rows[self._position(depth)]
            others = {p: rows[p] for p in range(size) if p != self._position(depth)}
            mine = dict.fromkeys(others, here)
            # Keys and queries are gathered at the same time: streams of their own.
            channel = COLUMN if kv else ROWS
            move = self._move(phase, "all_gather", axis, tensors, mine, others, channel)
            moves += [move] if others else []
        return moves

    def reduce(self, phase: str, *tensors: str) -> list[Move]:
        """Partial results of the team's rows to their owners: inside nodes first, then across."""
        moves = []
        for depth, (axis, size) in reversed([*enumerate(self.context.levels("team"))]):
            rows = [self._members_at(depth, p, kv=tensors[0] == "dk") for p in range(size)]
            here = rows[self._position(depth)]
            others = {p: rows[p] for p in range(size) if p != self._position(depth)}
            mine = dict.fromkeys(others, here)
            move = self._move(phase, "reduce", axis, tensors, others, mine)
            moves += [move] if others else []
        return moves

    def _position(self, depth: int) -> int:
        """Of this rank on a level of its team, 0 being the outer or the only one."""
        inner = self._team_inner
        return self.place.member % inner if depth else self.place.member // inner

    @property
    def _team_inner(self) -> int:
        levels = self.context.levels("team")
        return levels[1][1] if len(levels) == 2 else 1

    def _members_at(self, depth: int, position: int, *, kv: bool) -> Spans:
        """Rows of the members at a position of a level: on the inner one, of all nodes."""
        context, inner = self.context, self._team_inner
        if depth == 0:
            members = [position * inner + self.place.member % inner]
        else:
            members = [node * inner + position for node in range(context.team // inner)]
        rows, first = (self.call.kv if kv else self.call.q), self.place.turn * context.team
        return union([rows[first + member] for member in members])

    def _move(self, phase, verb, axis, tensors, sends, receives, channel=ROWS) -> Move:
        row_bytes = self.call.row_bytes(*tensors)
        return Move(phase, verb, axis, tensors, sends, receives, row_bytes, channel)

    # ---- the column --------------------------------------------------------------------------

    def column(self) -> Column:
        """The ring this rank is on: keys of its own member index, queries of every team."""
        context, call = self.context, self.call
        levels = context.levels("ring")
        (out_axis, outer), (in_axis, inner) = levels if len(levels) == 2 else (*levels, ("", 1))
        owners = tuple(t * context.team + self.place.member for t in range(context.ring))
        keys = tuple(call.kv[owner] for owner in owners)
        prune = getattr(context.schedule, "prune", False)
        axes = (out_axis, in_axis)
        return Column(call, outer, inner, axes, call.team_q, keys, owners, prune)

    def walk(self, phase: str, *, back: bool) -> tuple[Turn, ...]:
        column = self.column().shorter_way()
        if self.context.schedule.kind == "gather":
            return self._one_shot(column, phase, back=back)
        schedule = self.context.schedule
        ride = schedule.kind == "ring" and schedule.gradients == "ride"
        keep = {"none": (False, False), "far": (True, False), "all": (True, True)}[schedule.keep]
        return walk(column, divmod(self.place.turn, column.inner), phase, keep, back, ride)

    def walk_queries(self, column: Column, ride_phase: str) -> tuple[Turn, ...]:
        """Queries with dO and statistics descend the ring, dQ rides along until it is home."""
        call, n = self.call, column.outer
        here = self.place.turn - column.base
        keys = column.keys[column.at(here, 0)]
        going = ("q", "dout", "lse", "delta")
        steps = []
        for s in range(n):
            block = column.block(here, 0, s, 0)
            rows = column.queries[block]
            hop = give = None
            if s < n - 1:
                hop = shift(column, here, column.queries, s, "back-column", going, COLUMN)
            if n > 1:
                give = shift(column, here, column.queries, s, ride_phase, ("dq",), GRADIENTS)
            steps.append(Step(block, rows, call.case.mask, rows, keys, hop, give))
        return (Turn(tuple(steps)),)

    def _one_shot(self, column: Column, phase: str, *, back: bool) -> tuple[Turn, ...]:
        """All keys at once, and with `back` all partial gradients to their owners at once."""
        here, n, call = self.place.turn, column.outer, self.call
        others = {p: column.keys[p] for p in range(n) if p != here}
        mine = dict.fromkeys(others, column.keys[here])
        kept = self.context.schedule.keep == "all"
        hop = give = None
        if n > 1 and not (back and kept):
            row_bytes = call.row_bytes("k", "v")
            hop = Move(phase, "all_gather", "ring", ("k", "v"), mine, others, row_bytes, COLUMN)
        if n > 1 and back:
            grads = ("dk", "dv")
            give = Move(
                "back-owner",
                "reduce",
                "ring",
                grads,
                others,
                mine,
                call.row_bytes(*grads),
                GRADIENTS,
            )
        rows = union(column.keys)
        met = (call.case.mask, column.queries[here], rows)
        step = Step(self.place.index, rows, *met, None, give, kept=kept and n > 1)
        return (Turn((step,), hop),)


@dataclass(frozen=True, slots=True)
class _StarTrail(_Tile):
    """Concentric rings: team gathers, placement by the transpose of the grid, sub-rings."""

    def forward(self) -> Pass:
        before = self.heads_in()
        before += [*self.gather("team", "q"), *self.gather("team", "k", "v", kv=True)]
        before += self.placement("placement")
        return Pass(tuple(before), self._sub_ring(back=False), tuple(self.forward_out()))

    def backward(self) -> Pass:
        schedule = self.context.schedule
        assert schedule.kind == "startrail"
        before = [*self.heads("back-heads", "dout", "delta")]
        before += self.gather("back-team", "q", "dout", "lse", "delta")
        if schedule.keep == "none":
            before += [*self.gather("back-team", "k", "v", kv=True)]
            before += self.placement("back-placement")
        after = [*self.reduce("back-row-out", "dq"), *self.home(), *self.owners()]
        after += self.backward_out()
        turns = self._sub_ring(back=True)
        return Pass(tuple(before), turns, tuple(after), schedule.circulate, ride=True)

    def column(self) -> Column:
        """The sub-ring: ranks of one group with one member index, holding placed teams' keys."""
        call, size = self.call, self.context.ring // self.context.team
        first = self.place.turn // size * size
        teams = [self.placed_team(t, self.place.member) for t in range(first, first + size)]
        queries = call.team_q[first : first + size]
        keys = tuple(call.team_kv[team] for team in teams)
        return Column(call, size, 1, ("ring", ""), queries, keys, tuple(teams), False, first)

    def placed_team(self, turn: int, member: int) -> int:
        """The team whose keys rest with this rank after placement."""
        return (turn * self.context.team + member) % self.context.ring

    def _sub_ring(self, *, back: bool) -> tuple[Turn, ...]:
        column, schedule = self.column(), self.context.schedule
        assert schedule.kind == "startrail"
        if back and schedule.circulate == "q":
            return self.walk_queries(column, "back-column")
        hops = schedule.keep == "all" and schedule.circulate == "kv"
        phase = "back-column" if back else "column"
        here = (self.place.turn - column.base, 0)
        turns = walk(column, here, phase, (hops, hops), back, ride=True, ride_phase=phase)
        if schedule.keep == "none" or self.context.team == 1:
            return turns
        first = replace(turns[0].steps[0], kept=True)
        return (replace(turns[0], steps=(first,)), *turns[1:])

    def placement(self, phase: str) -> list[Move]:
        """Team t's keys from its member m to rank m * T + t: the transpose of the T x C grid."""
        teams = self.context.ring
        goes = self.place.member * teams + self.place.turn
        member, team = divmod(self.place.index, teams)
        comes = team * self.context.team + member
        rows = self.call.team_kv
        return self._transpose(
            phase, ("k", "v"), (goes, rows[self.place.turn]), (comes, rows[team])
        )

    def home(self) -> list[Move]:
        """The inverse: gradients of a placed team back to the member that sent its keys."""
        teams = self.context.ring
        member, team = divmod(self.place.index, teams)
        comes = self.place.member * teams + self.place.turn
        rows = self.call.team_kv
        there = (team * self.context.team + member, rows[team])
        return self._transpose("back-owner", ("dk", "dv"), there, (comes, rows[self.place.turn]))

    def _transpose(self, phase, tensors, goes, comes) -> list[Move]:
        """One message out and one in on `cp`; none where the grid's corners map to themselves."""
        if self.context.team == 1:
            return []
        u, moved = self.context.ulysses, goes[0] != self.place.index
        sends = {goes[0] * u + self.place.ulysses: goes[1]} if moved else {}
        receives = {comes[0] * u + self.place.ulysses: comes[1]} if moved else {}
        row_bytes = self.call.row_bytes(*tensors)
        return [Move(phase, "permute", "cp", tensors, sends, receives, row_bytes)]

    def owners(self) -> list[Move]:
        """Each member of the home team holds one group's sum for all its keys: to the owners."""
        return self.reduce("back-owner", "dk", "dv")


def _peak(context: Context, case: AttentionCase, name: str) -> float:
    """Blocks alive in the column; float32 sums weigh by the inputs' bytes."""
    a, g = context.team, kv_heads(case, context.ulysses) * context.ulysses / case.heads_q
    wide = case.stat_bytes / case.item_bytes
    back = name == "backward"
    wire = wide if back and grad_wire(context) == "float32" else 1.0
    kv = 2 * g
    if context.schedule.kind == "startrail":
        kv *= a
        sums = wide * kv + 2 * kv if back else 0.0
        rows = (4 + wide) * a if back else a + wide * a
        gathered = (2 + 2 * g) * a if context.team > 1 else 0.0
        return max(rows + 2 * kv + sums, rows + 2 * kv + gathered)
    if context.schedule.kind == "gather":
        held, gradients = kv * context.ring, kv * context.ring * (wide + wire)
        return (4 + wide + held + gradients) if back else 1 + wide + held
    buffers = 2.0 if context.ring > 1 else 1.0
    buffers += 1.0 if min(context.inner[1], context.ring // context.inner[1]) > 1 else 0.0
    if not back:
        return a + buffers * kv + wide * a
    return (3 + wide + 1) * a + buffers * kv + wide * kv + wire * kv + wide * kv
