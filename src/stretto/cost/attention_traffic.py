"""Exact bytes of a plan's attention: per phase, per rank and per class of link.

From the schedules that the ranks carry out, so windows, documents and uneven lengths count as they
are sent; the closed forms of `attention_bytes` are those of equal shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stretto import axes
from stretto.plan.model import Plan
from stretto.plan.moves import PASSES
from stretto.plan.options import AttentionCase
from stretto.plan.schedule import Schedule, build_schedule


@dataclass(slots=True)
class Line:
    """One phase on one axis, of one attention of one layer, at once in all groups of data ranks.

    `least`, `most`: bytes sent by a rank. `messages`: of the rank that sends most of them.
    `inside`, `across`: bytes of all ranks, of all groups, within nodes and between them.
    """

    phase: str
    verb: str
    axis: str
    most: int = 0
    least: int = 0
    messages: int = 0
    inside: int = 0
    across: int = 0
    _ranks: int = field(default=0, repr=False)

    def add(self, sent: int, messages: int, inside: int) -> None:
        """What one rank sends, of it `inside` to ranks of its node."""
        self.least = min(self.least, sent) if self._ranks else sent
        self.most = max(self.most, sent)
        self.messages = max(self.messages, messages)
        self.inside += inside
        self.across += sent - inside
        self._ranks += 1

    def as_dict(self) -> dict[str, str | int]:
        """Plain data for a result file."""
        names = ("phase", "verb", "axis", "least", "most", "messages", "inside", "across")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Ledger:
    """All lines of forward and backward, and totals per rank, in bytes of one attention.

    `per_rank`: by logical index, the same in every group of data ranks. `out_of_node`: sent by the
    devices of each node to others. `peak_blocks`: of the rank that holds most.
    """

    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    per_rank: tuple[int, ...]
    out_of_node: dict[int, int]
    steps: int
    peak_blocks: float

    @property
    def links(self) -> dict[str, int]:
        """Bytes of all ranks by class of link."""
        lines = [*self.forward, *self.backward]
        return {
            "in node": sum(line.inside for line in lines),
            "between nodes": sum(line.across for line in lines),
        }


def ledger(plan: Plan, case: AttentionCase, nodes: Sequence[int]) -> Ledger:
    """The bytes of `plan.cp` for one call; `nodes`: the node of each device, in rank order.

    Without a cluster all ranks are of one node.
    """
    sizes, lines = plan.sizes, ({}, {})
    per_rank, out = [0] * plan.cp.degree, dict.fromkeys(nodes, 0)
    steps, peak = 0, 0.0
    # Rank by rank, since the schedules of 1000 ranks are millions of moves.
    for rank, worlds in enumerate(_worlds(plan)):
        done = build_schedule(plan.cp, case.at(rank))
        for world in worlds:
            near, sends = _Near(world, sizes, nodes), 0
            for found, name in zip(lines, PASSES, strict=True):
                for key, (sent, messages, inside) in _sums(done, name, near).items():
                    found.setdefault(key, Line(*key)).add(sent, messages, inside)
                    sends += sent
                    out[nodes[world]] += sent - inside
            per_rank[rank] = sends
        steps = max(steps, sum(1 for _ in done.forward.steps))
        peak = max(peak, done.peak_blocks())
    forward, backward = (tuple(line for line in each.values() if line.most) for each in lines)
    return Ledger(forward, backward, tuple(per_rank), out, steps, peak)


def _worlds(plan: Plan) -> list[list[int]]:
    """Ranks of the world by their logical index in attention: one of each group of data ranks."""
    found: list[list[int]] = [[] for _ in range(plan.cp.degree)]
    sizes = plan.sizes
    for world in range(plan.world_size):
        found[axes.position(world, "cp", sizes)].append(world)
    return found


@dataclass(slots=True)
class _Near:
    """Which positions on an axis are in the node of one rank."""

    world: int
    sizes: Mapping[str, int]
    nodes: Sequence[int]
    _known: dict[str, frozenset[int]] = field(default_factory=dict)

    def on(self, axis: str) -> frozenset[int]:
        if axis not in self._known:
            peers = axes.peers(self.world, axis, self.sizes)
            here = self.nodes[self.world]
            near = (place for place, rank in enumerate(peers) if self.nodes[rank] == here)
            self._known[axis] = frozenset(near)
        return self._known[axis]


def _sums(done: Schedule, name: str, near: _Near) -> dict[tuple[str, str, str], list[int]]:
    """Of one rank, by phase, verb and axis: bytes, messages, bytes within the node."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for move in done.moves((name,)):
        entry = sums.setdefault((move.phase, move.verb, move.axis), [0, 0, 0])
        inside = near.on(move.axis)
        for place, rows in move.sends.items():
            sent = move.row_bytes * rows.rows
            entry[0] += sent
            entry[1] += bool(rows)
            entry[2] += sent if place in inside else 0
    return sums
