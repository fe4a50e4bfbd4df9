"""Bytes of sequence-parallel attention in closed form: what each phase sends, over which axis.

Exact for equal shards that every rank needs all of (`prune` off, or a mask that hides no block).
Units of the formulas: one *block* is a rank's queries, g = key heads / query heads; R is one
scalar per row and head. StarTrail's are per rank that moves in its placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stretto import axes
from stretto.plan.options import Context, Gather, Ring, StarTrail


@dataclass(frozen=True, slots=True)
class Call:
    """One attention over a sequence cut into equal shards; rows are those of one rank.

    `scalar_bytes`: of a log-sum-exp or a delta. `return_lse`: the statistics travel home too.
    """

    batch: int
    rows: int
    kv_rows: int
    heads: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    scalar_bytes: int = 4
    return_lse: bool = False

    @property
    def q_block(self) -> int:
        """Bytes of a rank's queries: one block."""
        return self.batch * self.rows * self.heads * self.head_dim * self.item_bytes

    def kv_block(self, ulysses: int) -> int:
        """Bytes of a rank's keys and values: 2g blocks; a head per Ulysses rank at least."""
        held = max(self.kv_heads, ulysses)
        return 2 * self.batch * self.kv_rows * held * self.head_dim * self.item_bytes

    @property
    def scalars(self) -> int:
        """Bytes of one scalar per row and head: R."""
        return self.batch * self.rows * self.heads * self.scalar_bytes


@dataclass(frozen=True, slots=True)
class Term:
    """Equal messages of one phase: who sends to whom, how large, how often in sequence.

    `pattern`: `exchange` (each rank to every other of its group on the axis), `shift` (to the
    next), `transpose` (StarTrail's placement, there or back), `sub-ring` (to the next of the same
    group and member). `hidden`: under the kernels.
    """

    phase: str
    pattern: str
    axis: str
    message: int
    times: int = 1
    hidden: bool = False

    def sent(self, sizes: Mapping[str, int]) -> int:
        """Bytes sent by one rank."""
        ranks = axes.size(self.axis, sizes)
        fan_out = ranks - 1 if self.pattern == "exchange" else int(ranks > 1)
        return self.message * self.times * fan_out


def terms(context: Context, call: Call, *, back: bool) -> list[Term]:
    """The messages of one forward or backward, in order of their phases."""
    if isinstance(context.schedule, StarTrail) and context.team > 1:
        found = _startrail_back(context, call) if back else _startrail(context, call)
    elif isinstance(context.schedule, Gather):
        found = _gather(context, call, back=back)
    elif back:
        found = _tile_back(context, call)
    else:
        found = _tile(context, call)
    return [term for term in found if term.sent(context.sizes)]


def by_phase(found: Iterable[Term], context: Context) -> dict[tuple[str, str], int]:
    """Bytes sent by one rank per (phase, axis)."""
    sums: Counter[tuple[str, str]] = Counter()
    for term in found:
        sums[term.phase, term.axis] += term.sent(context.sizes)
    return dict(sums)


def total(found: Iterable[Term], context: Context) -> int:
    """Bytes sent by one rank."""
    return sum(term.sent(context.sizes) for term in found)


def keeps(context: Context, level: str) -> bool:
    """Whether backward finds keys and values that came over this level in memory."""
    keep = context.schedule.keep
    return keep == "all" or (keep == "far" and level != "ring_in")


def _heads(context: Context, call: Call, *, back: bool) -> Term:
    """The exchange of heads before the rows; (2 + 2g)(u-1)/u with the one after them."""
    u = context.ulysses
    message = (call.q_block + call.scalars) if back else call.q_block + call.kv_block(u)
    return Term("back-heads" if back else "heads", "exchange", "ulysses", message // u)


def _heads_out(context: Context, call: Call, *, back: bool) -> Term:
    u = context.ulysses
    home = call.kv_block(u) if back else call.scalars * call.return_lse
    message = call.q_block + home
    return Term("back-heads-out" if back else "heads-out", "exchange", "ulysses", message // u)


def _rows(phase: str, context: Context, message: int, *, first: str) -> list[Term]:
    """A gather of rows crosses nodes first and fans out inside; a reduction goes the other way."""
    found, parts = [], 1
    for axis, size in context.levels("team"):
        found.append(Term(phase, "exchange", axis, message * parts))
        parts *= size
    return found if first == "node" else found[::-1]


def _tile(context: Context, call: Call) -> list[Term]:
    """Ulysses x row team x column ring; with a team of one the ring itself."""
    return [
        _heads(context, call, back=False),
        *_rows("row-q", context, call.q_block, first="node"),
        *_column("column", context, call),
        *_rows("row-out", context, call.q_block + call.scalars, first="device"),
        _heads_out(context, call, back=False),
    ]


def _tile_back(context: Context, call: Call) -> list[Term]:
    schedule = context.schedule
    if isinstance(schedule, Ring) and schedule.circulate == "q":
        moved = _queries_ride(context, call)
    else:
        walked = _column("back-column", context, call)
        kept = [term for term in walked if not keeps(context, term.axis)]
        moved = [*kept, *_owners(context, call)]
    return [
        _heads(context, call, back=True),
        *_rows("back-row", context, 2 * (call.q_block + call.scalars), first="node"),
        *moved,
        *_rows("back-row-out", context, call.q_block, first="device"),
        _heads_out(context, call, back=True),
    ]


def _column(phase: str, context: Context, call: Call) -> list[Term]:
    """Keys and values down the column: 2g(b-1), of it 2g(b_out-1) across nodes."""
    block, found, cycles = call.kv_block(context.ulysses), [], 1
    for axis, size in context.levels("ring"):
        found.append(Term(phase, "shift", axis, block, cycles * (size - 1), hidden=True))
        cycles *= size
    return found


def _owners(context: Context, call: Call) -> list[Term]:
    """dK, dV to their owners: in the node to the delegate, across nodes one sum per node."""
    block, schedule = call.kv_block(context.ulysses), context.schedule
    wire = block
    if getattr(schedule, "grad_wire", "input") == "float32":
        wire = block * max(4, call.item_bytes) // call.item_bytes
    if isinstance(schedule, Ring) and schedule.gradients == "ride":
        return [Term("back-owner", "shift", "ring", wire, context.ring, hidden=True)]
    found, parts = [], 1
    for axis, size in context.levels("ring"):
        found.append(Term("back-owner", "exchange", axis, wire * parts, hidden=True))
        parts *= size
    return found[::-1]


def _queries_ride(context: Context, call: Call) -> list[Term]:
    """Queries, dO and their scalars move, dQ with them: it makes one hop more, to arrive home."""
    going, b = 2 * (call.q_block + call.scalars), context.ring
    return [
        Term("back-column", "shift", "ring", going, b - 1, hidden=True),
        Term("back-owner", "shift", "ring", call.q_block, b, hidden=True),
    ]


def _gather(context: Context, call: Call, *, back: bool) -> list[Term]:
    """All keys and values in one shot, 2g(P-1); their gradients straight to the owners."""
    block = call.kv_block(context.ulysses)
    moved = [Term("back-column" if back else "column", "exchange", "ring", block)]
    if back:
        again = [] if context.schedule.keep == "all" else moved
        moved = [*again, Term("back-owner", "exchange", "ring", block)]
    return [_heads(context, call, back=back), *moved, _heads_out(context, call, back=back)]


def _startrail(context: Context, call: Call) -> list[Term]:
    """Team gathers, transpose, sub-rings of ring / team ranks, reduce-scatter."""
    c, q, kv = context.team, call.q_block, call.kv_block(context.ulysses)
    return [
        _heads(context, call, back=False),
        Term("team", "exchange", "team", q + kv),
        Term("placement", "transpose", "cp", c * kv),
        Term("column", "sub-ring", "ring", c * kv, context.ring // c - 1, hidden=True),
        Term("row-out", "exchange", "team", q + call.scalars),
        _heads_out(context, call, back=False),
    ]


def _startrail_back(context: Context, call: Call) -> list[Term]:
    """Queries with their gradient go round the sub-ring, or keys and values with theirs."""
    schedule, c, g = context.schedule, context.team, context.ring // context.team
    assert isinstance(schedule, StarTrail), schedule
    q, kv = call.q_block, call.kv_block(context.ulysses)
    placed = schedule.keep != "none"
    found = [_heads(context, call, back=True)]
    found += [Term("back-team", "exchange", "team", 2 * (q + call.scalars) + (0 if placed else kv))]
    found += [] if placed else [Term("back-placement", "transpose", "cp", c * kv)]
    going, gradient = (2 * c * (q + call.scalars), c * q), (c * kv, c * kv)
    going, gradient = going if schedule.circulate == "q" else gradient
    home = g if g > 1 else 0
    return [
        *found,
        Term("back-column", "sub-ring", "ring", going, g - 1, hidden=True),
        Term("back-column", "sub-ring", "ring", gradient, home, hidden=True),
        Term("back-row-out", "exchange", "team", q),
        Term("back-owner", "transpose", "cp", c * kv),
        Term("back-owner", "exchange", "team", kv),
        _heads_out(context, call, back=True),
    ]
