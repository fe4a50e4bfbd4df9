"""The column of an attention plan: which rows travel down a ring, or a ring of rings, and back.

A rank at turn x and step y of the walk holds the block of the rank x circles and y places further
on, so blocks descend. The published ring ascends: the mirror image, with equal bytes. Pruned
columns go the way that sends less: zigzag blocks that descend are needed by fewer ranks at every
hop, blocks under a window that ascend meet who sees them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from stretto.plan.moves import COLUMN, GRADIENTS, Move, Step, Turn
from stretto.plan.ranges import Spans, needed

if TYPE_CHECKING:
    from stretto.plan.context import AttentionCase, Context


def union(parts: Iterable[Spans]) -> Spans:
    return Spans(tuple(span for rows in parts for span in rows))


@dataclass(slots=True)
class Call:
    """One call as all its ranks see it: row sets by super-rank and team, bytes per row."""

    context: Context
    case: AttentionCase
    q: tuple[Spans, ...]
    kv: tuple[Spans, ...]
    team_q: tuple[Spans, ...]
    team_kv: tuple[Spans, ...]
    seen: dict[tuple[Spans, Spans], Spans] = field(default_factory=dict)
    #: What columns found out about themselves, for the next rank that asks.
    journeys: dict[tuple, dict[tuple[int, int], Spans]] = field(default_factory=dict)
    ways: dict[int, int] = field(default_factory=dict)
    row_sizes: dict[tuple[str, ...], int] = field(default_factory=dict)

    def row_bytes(self, *tensors: str) -> int:
        """Bytes of one row of these tensors on a rank that holds its share of the heads."""
        if tensors not in self.row_sizes:
            self.row_sizes[tensors] = sum(self._bytes_of(tensor) for tensor in tensors)
        return self.row_sizes[tensors]

    def _bytes_of(self, tensor: str) -> int:
        case, u = self.case, self.context.ulysses
        if tensor in ("lse", "delta"):
            return case.batch * (case.heads_q // u) * case.stat_bytes
        heads = case.heads_q // u if tensor in ("q", "out", "dout", "dq") else kv_heads(case, u)
        return case.batch * heads * case.head_dim * case.item_bytes

    @property
    def gradient_row_bytes(self) -> int:
        """Bytes of one row of dK and dV on their way to the owner."""
        wide = grad_wire(self.context) == "float32"
        item = max(self.case.item_bytes, 4 if wide else 0)
        return self.row_bytes("k", "v") // self.case.item_bytes * item

    def needed(self, q: Spans, kv: Spans) -> Spans:
        """Rows of `kv` that any row of `q` sees; asked for by many ranks, computed once."""
        if (q, kv) not in self.seen:
            self.seen[q, kv] = needed(self.case.mask, q, kv)
        return self.seen[q, kv]


def kv_heads(case: AttentionCase, ulysses: int) -> int:
    """Key/value heads per rank: a head is copied where ranks outnumber heads."""
    return max(1, case.heads_kv // ulysses)


def grad_wire(context: Context) -> str:
    """Dtype in which dK and dV travel to their owners: `input` or `float32`."""
    return getattr(context.schedule, "grad_wire", "input")


@lru_cache(maxsize=64)
def call_of(context: Context, case: AttentionCase) -> Call:
    u, a = context.ulysses, context.team

    def joined(rows: Sequence[Spans], size: int) -> tuple[Spans, ...]:
        return tuple(union(rows[i : i + size]) for i in range(0, len(rows), size))

    q, kv = joined(case.q_rows, u), joined(case.kv_rows, u)
    return Call(context, case, q, kv, joined(q, a), joined(kv, a))


@dataclass(frozen=True, slots=True)
class Column:
    """A ring, or a ring of rings: at turn x and step y the rank at (o, i) holds the block of
    (o + way * x, i + way * y); `way` 1 descends, -1 ascends.

    `queries`, `keys`: rows by flat position o * inner + i. `blocks`: their names. `base`: position
    on the outer axis of o = 0. One level is `inner` 1.
    """

    call: Call
    outer: int
    inner: int
    axes: tuple[str, str]
    queries: tuple[Spans, ...]
    keys: tuple[Spans, ...]
    blocks: tuple[int, ...]
    prune: bool
    base: int = 0
    way: int = 1

    def at(self, o: int, i: int) -> int:
        return (o % self.outer) * self.inner + i % self.inner

    def block(self, o: int, i: int, x: int, y: int) -> int:
        """The block that the rank at (o, i) holds at turn x and step y."""
        return self.at(o + self.way * x, i + self.way * y)

    def outer_position(self, o: int) -> int:
        return self.base + o % self.outer

    def needs(self, o: int, i: int, block: int) -> Spans:
        """Rows of a block that the rank at (o, i) gives gradients for."""
        if not self.prune:
            return self.keys[block]
        return self.call.needed(self.queries[self.at(o, i)], self.keys[block])

    def node_needs(self, o: int, block: int) -> Spans:
        """Rows of a block that anybody on the inner circle o gives gradients for."""
        if not self.prune:
            return self.keys[block]
        return union([self.needs(o, i, block) for i in range(self.inner)])

    def held(self, o: int, i: int, x: int, y: int) -> Spans:
        """Rows of its block that the rank at (o, i) holds: those it or a later holder needs.

        A rank sets out with its own block, all of it, also where nobody needs some of its rows.
        """
        block = self.block(o, i, x, y)
        if not self.prune or (x, y) == (0, 0):
            return self.keys[block]
        return self._journey(block)[x, y]

    def _journey(self, block: int) -> dict[tuple[int, int], Spans]:
        """Rows of a block that arrive at every turn and step of its way, from the end back."""
        key = (self.blocks[block], self.way)
        if key not in self.call.journeys:
            held: dict[tuple[int, int], Spans] = {}
            o, i = divmod(block, self.inner)
            later = Spans()
            for x in reversed(range(self.outer)):
                here = Spans()
                for y in reversed(range(self.inner)):
                    needs = self.needs(o - self.way * x, i - self.way * y, block)
                    here = _both(here, needs)
                    held[x, y] = here
                later = held[x, 0] = _both(here, later)
            self.call.journeys[key] = held
        return self.call.journeys[key]

    @property
    def moved_rows(self) -> int:
        """Rows that all ranks of the column send forward."""
        journeys = (self._journey(block) for block in range(len(self.keys)))
        return sum(rows.rows for held in journeys for at, rows in held.items() if at != (0, 0))

    def shorter_way(self) -> Column:
        """The column as it is, or ascending if pruning then leaves less to send."""
        if not self.prune:
            return self
        ways = self.call.ways
        if self.blocks[0] not in ways:
            up = replace(self, way=-1)
            ways[self.blocks[0]] = -1 if up.moved_rows < self.moved_rows else 1
        return replace(self, way=ways[self.blocks[0]])


def _both(a: Spans, b: Spans) -> Spans:
    return a if a == b or not b else a | b


def shift(
    column: Column,
    here: int,
    rows: Sequence[Spans],
    step: int,
    phase: str,
    tensors: tuple[str, ...],
    channel: int,
) -> Move:
    """The block held at `step` goes on, whole; that of the neighbour behind comes."""
    call, way = column.call, column.way
    sends = {column.outer_position(here - way): rows[column.block(here, 0, step, 0)]}
    receives = {column.outer_position(here + way): rows[column.block(here + way, 0, step, 0)]}
    row_bytes = call.gradient_row_bytes if tensors[0] == "dk" else call.row_bytes(*tensors)
    return Move(phase, "shift", column.axes[0], tensors, sends, receives, row_bytes, channel)


def walk(
    column: Column,
    here: tuple[int, int],
    phase: str,
    keep: tuple[bool, bool],
    back: bool,
    ride: bool = False,
    ride_phase: str = "back-owner",
) -> tuple[Turn, ...]:
    """Keys and values down the column as seen from `here`, with `back` their gradients home.

    `keep`: whether blocks that came over the outer and the inner axis stay for backward.
    """
    o, i = here
    mask, queries = column.call.case.mask, column.queries[column.at(o, i)]
    turns = []
    for x in range(column.outer):
        steps = []
        for y in range(column.inner):
            rows = column.held(o, i, x, y)
            hop = None if back and keep[1] else _inner_hop(column, o, i, x, y, phase)
            give = None
            if back:
                give = _ride(column, o, x, ride_phase) if ride else _inner_give(column, o, i, x, y)
            kept = keep[1] if y else keep[0] and x > 0
            block = column.blocks[column.block(o, i, x, y)]
            steps.append(Step(block, rows, mask, queries, rows, hop, give, kept))
        hop = None if back and keep[0] else _outer_hop(column, o, i, x, phase)
        give = _outer_give(column, o, i, x) if back and not ride else None
        turns.append(Turn(tuple(steps), hop, give))
    return tuple(turns)


def _inner_hop(column: Column, o: int, i: int, x: int, y: int, phase: str) -> Move | None:
    if y == column.inner - 1:
        return None
    n, way, row_bytes = column.inner, column.way, column.call.row_bytes("k", "v")
    sends = {(i - way) % n: column.held(o, i - way, x, y + 1)}
    receives = {(i + way) % n: column.held(o, i, x, y + 1)}
    return Move(phase, "shift", column.axes[1], ("k", "v"), sends, receives, row_bytes, COLUMN)


def _outer_hop(column: Column, o: int, i: int, x: int, phase: str) -> Move | None:
    if x == column.outer - 1:
        return None
    way, row_bytes = column.way, column.call.row_bytes("k", "v")
    sends = {column.outer_position(o - way): column.held(o - way, i, x + 1, 0)}
    receives = {column.outer_position(o + way): column.held(o, i, x + 1, 0)}
    return Move(phase, "shift", column.axes[0], ("k", "v"), sends, receives, row_bytes, COLUMN)


def _inner_give(column: Column, o: int, i: int, x: int, y: int) -> Move | None:
    """This step's gradients to the delegate of their owner on this circle, and those of mine."""
    if y == 0:
        return None
    n, away, row_bytes = column.inner, column.way * y, column.call.gradient_row_bytes
    sends = {(i + away) % n: column.needs(o, i, column.block(o, i, x, y))}
    receives = {(i - away) % n: column.needs(o, i - away, column.block(o, i, x, 0))}
    return Move(
        "back-owner", "reduce", column.axes[1], ("dk", "dv"), sends, receives, row_bytes, GRADIENTS
    )


def _outer_give(column: Column, o: int, i: int, x: int) -> Move | None:
    """What this circle summed for a block of another circle, to its owner."""
    if x == 0:
        return None
    away, row_bytes = column.way * x, column.call.gradient_row_bytes
    sends = {column.outer_position(o + away): column.node_needs(o, column.block(o, i, x, 0))}
    receives = {column.outer_position(o - away): column.node_needs(o - away, column.at(o, i))}
    return Move(
        "back-owner", "reduce", column.axes[0], ("dk", "dv"), sends, receives, row_bytes, GRADIENTS
    )


def _ride(column: Column, o: int, x: int, phase: str) -> Move | None:
    """The gradients of the block at hand go on with it; after the last step they are home."""
    if column.outer == 1:
        return None
    return shift(column, o, column.keys, x, phase, ("dk", "dv"), GRADIENTS)
