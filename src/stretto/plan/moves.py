"""What ranks do in attention, as data: moves with explicit peers, steps of a walk, passes.

Phases, forward: heads (q; k, v: whole rows, a share of heads), row-q (queries over the team),
column (keys, values), row-out (partial outputs with their log-sum-exp to the owner), heads-out.
StarTrail has team (queries; keys, values) and placement instead of row-q. Backward: back-heads (dO,
delta), back-row (q, dO, lse, delta), back-column, back-owner (dK, dV, or dQ that rides home),
back-row-out (dQ), back-heads-out. StarTrail: back-team, back-placement, and gradients that ride
under back-column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from stretto.plan.ranges import Mask, Piece, Spans, pieces

PASSES = ("forward", "backward")
#: Concurrent streams of messages: columns, gradients on their way home, rows and heads.
COLUMN, GRADIENTS, ROWS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Move:
    """One exchange on an axis: which rows of which tensors this rank sends to whom, and receives.

    Peers are positions on `axis`, rows are global positions, `row_bytes` is one row of all tensors.
    Every rank of the axis makes the move, with empty rows where it has nothing to say.
    """

    phase: str
    verb: str
    axis: str
    tensors: tuple[str, ...]
    sends: Mapping[int, Spans]
    receives: Mapping[int, Spans]
    row_bytes: int
    channel: int = ROWS

    @property
    def sent(self) -> int:
        """Bytes sent to other ranks."""
        return self.row_bytes * sum(rows.rows for rows in self.sends.values())

    @property
    def messages(self) -> int:
        """Messages sent: empty ones are none."""
        return sum(bool(rows) for rows in self.sends.values())


@dataclass(frozen=True)
class Step:
    """One block at rest: which rows of it are here, what is computed, what leaves meanwhile.

    `block`: super-rank (StarTrail: team) whose keys these are, or queries where those move.
    `q`, `k`: the rows of queries and of keys that meet, under `mask`. `hop`: brings the next
    block, in flight under this step. `give`: takes this step's gradients on, in flight under the
    next. `kept`: forward keeps the block for backward, which finds it.
    """

    block: int
    rows: Spans
    mask: Mask
    q: Spans
    k: Spans
    hop: Move | None = None
    give: Move | None = None
    kept: bool = False

    # Cut when first asked for: what only counts bytes never does, and over 1000 ranks there are a
    # million pairs of blocks.
    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What is computed: the visible pairs, in local rows of `q` and `k`."""
        return pieces(self.mask, self.q, self.k)

    @property
    def pairs(self) -> int:
        return sum(piece.pairs for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Turn:
    """The steps on one inner circle. `hop` brings the next turn's first block, in flight under all
    of them; `give` takes the gradients that the circle summed to their owner in another node."""

    steps: tuple[Step, ...]
    hop: Move | None = None
    give: Move | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward or backward: moves before the column, the column, moves after it, in order.

    `moving`: what walks, keys and values or queries. `ride`: gradients travel with the blocks.
    """

    before: tuple[Move, ...]
    turns: tuple[Turn, ...]
    after: tuple[Move, ...]
    moving: str = "kv"
    ride: bool = False

    def moves(self) -> Iterator[Move]:
        """All moves, in an order that respects what depends on what."""
        yield from self.before
        for turn in self.turns:
            for step in turn.steps:
                yield from (move for move in (step.hop, step.give) if move)
            yield from (move for move in (turn.hop, turn.give) if move)
        yield from self.after

    @property
    def steps(self) -> Iterator[Step]:
        return (step for turn in self.turns for step in turn.steps)
