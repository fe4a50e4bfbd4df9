"""The option of the `cp` axis: one sequence over P = ulysses x team x ring ranks, exactly.

`ulysses` splits heads (an all-to-all before and after), `team` shares queries (gathered, partial
outputs reduced), `ring` moves keys and values (gradients return to their owner). Ring attention,
Ulysses, USP, double ring, all-gather, StarTrail's concentric rings and the tile are points.

A rank's logical index is (ring * team degree + team) * ulysses degree + ulysses, its position on
the mesh axis `cp`; shards follow it. Schedules of two levels name the axes they send on
(`ring_out`, `team_in`, ...); those of one level use `ring` and `team`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from stretto.errors import PlanMismatch
from stretto.plan.checks import (
    FORBID,
    check_choice,
    check_degree,
    check_divides,
    divisors,
    is_whole,
)
from stretto.plan.circulation import DoubleRing, Gather, Ring, Schedule, StarTrail, Tile
from stretto.plan.moves import PASSES
from stretto.plan.ranges import FULL, LAYOUTS, Layout, Mask, Spans, resolve_layout, shard
from stretto.plan.schedule import schedule
from stretto.plan.traffic import Traffic


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What the bytes of one attention call depend on.

    `item_bytes`: of q, k and v. `q_rows`, `kv_rows`: global positions held by every rank, by
    logical index. `rank`: the logical index asked about. `return_lse`: whether the statistics
    travel home too.
    """

    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    item_bytes: int
    q_rows: tuple[Spans, ...]
    kv_rows: tuple[Spans, ...]
    mask: Mask
    rank: int = 0
    return_lse: bool = False

    @classmethod
    def of(
        cls,
        context: Context,
        *,
        tokens: int,
        kv_tokens: int | None = None,
        heads: tuple[int, int],
        head_dim: int,
        batch: int = 1,
        item_bytes: int = 2,
        mask: Mask = FULL,
        rank: int = 0,
        return_lse: bool = False,
    ) -> AttentionCase:
        """The call on sequences of these total lengths, sharded as the plan lays them out.

        `heads`: query and key/value heads. Raises ShapeError, PlanMismatch.
        """
        kv_tokens = tokens if kv_tokens is None else kv_tokens
        mask.check(tokens, kv_tokens)
        q_rows = shard(context.layout, tokens, context.degree, mask)
        kv_rows = q_rows
        if kv_tokens != tokens:
            kv_rows = shard(context.layout, kv_tokens, context.degree, mask)
        sizes = (batch, *heads, head_dim, item_bytes)
        return cls(*sizes, q_rows, kv_rows, mask, rank, return_lse)

    @property
    def stat_bytes(self) -> int:
        """Of a log-sum-exp or delta: float32, float64 where the inputs are."""
        return max(4, self.item_bytes)

    def at(self, rank: int) -> AttentionCase:
        """The same call seen from another rank."""
        return replace(self, rank=rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One sequence over `ulysses` x `team` x `ring` ranks.

    `layout`: which positions a rank holds: zigzag, contiguous, documents, ranges written out, or
    `auto` by the mask. The default schedule is the tile, which with a team of one is the ring.
    Raises PlanMismatch, listing the legal values, when degrees do not fit the schedule.
    """

    __pydantic_config__ = FORBID
    ulysses: int = 1
    team: int = 1
    ring: int = 1
    schedule: Schedule = field(default_factory=Tile)
    layout: Layout = "auto"

    def __post_init__(self):
        for axis in ("ulysses", "team", "ring"):
            check_degree(axis, getattr(self, axis))
        if isinstance(self.layout, str):
            check_choice("layout", self.layout, LAYOUTS)
        else:
            self._check_ranges()
        self._check_schedule()

    def _check_ranges(self) -> None:
        """Ranges may be given as lists too, as files hold them."""
        try:
            ranges = tuple(tuple((start, end) for start, end in own) for own in self.layout)
        except (TypeError, ValueError):
            raise PlanMismatch(
                f"layout {self.layout!r}: ranges of every rank, each (start, end), or a name"
            ) from None
        for start, end in (span for own in ranges for span in own):
            if not (is_whole(start) and is_whole(end) and 0 <= start <= end):
                raise PlanMismatch(
                    f"layout: range ({start!r}, {end!r}); it runs from a row, 0 at least, to one "
                    "past its last row, both ints"
                )
        if len(ranges) != self.degree:
            raise PlanMismatch(
                f"layout: ranges for {len(ranges)} ranks, the plan has {self.degree}"
            )
        object.__setattr__(self, "layout", ranges)

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if not isinstance(schedule, Schedule):
            raise PlanMismatch(
                f"schedule {schedule!r} is a {type(schedule).__name__}; expected Ring(), "
                "DoubleRing(inner=...), Gather(), StarTrail() or Tile()\n"
                "  to fix: one of those, or a published plan by name, Context.named(name, ranks)"
            )
        if isinstance(schedule, StarTrail) and self.ring % self.team:
            ranks = self.team * self.ring
            legal = [c for c in divisors(ranks) if ranks % (c * c) == 0]
            raise PlanMismatch(
                f"startrail: team {self.team} needs team^2 to divide the {ranks} ranks of team x "
                f"ring; legal teams are {', '.join(map(str, legal))}\n"
                f"  to fix: one of those, or schedule tile, which takes any team"
            )
        if isinstance(schedule, Ring | DoubleRing) and self.team > 1:
            raise PlanMismatch(
                f"schedule {schedule.kind} has no team, got team={self.team}; "
                "teams belong to tile and startrail, legal here is team 1"
            )
        if isinstance(schedule, DoubleRing):
            check_divides("double-ring: inner", schedule.inner, self.ring)
        if isinstance(schedule, Tile):
            check_divides("tile: team_inner", schedule.team_inner, self.team)
            check_divides("tile: ring_inner", schedule.ring_inner, self.ring)

    @property
    def degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.team * self.ring

    @property
    def inner(self) -> tuple[int, int]:
        """How much of team and ring lies within a node."""
        if isinstance(self.schedule, Tile):
            return self.schedule.team_inner, self.schedule.ring_inner
        return (1, self.schedule.inner) if isinstance(self.schedule, DoubleRing) else (1, 1)

    @property
    def two_level(self) -> bool:
        """Whether the schedule treats node and in-node ranks differently."""
        return self.inner != (1, 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes that make up `cp`."""
        team_in, ring_in = self.inner
        return {
            "ring_out": self.ring // ring_in,
            "team_out": self.team // team_in,
            "ring_in": ring_in,
            "team_in": team_in,
            "ulysses": self.ulysses,
        }

    def levels(self, axis: str) -> tuple[tuple[str, int], ...]:
        """(mesh axis, size) of `ring` or `team`, outer level first; one entry for one level."""
        if not self.two_level:
            return ((axis, getattr(self, axis)),)
        sizes = self.sizes
        return tuple((f"{axis}_{level}", sizes[f"{axis}_{level}"]) for level in ("out", "in"))

    def short(self) -> str:
        degrees = [
            f"{axis}{getattr(self, axis)}"
            for axis in ("ring", "team", "ulysses")
            if getattr(self, axis) > 1
        ]
        kind = self.schedule.short()
        words = [" x ".join(degrees) or "one rank"]
        words += [kind] * (kind not in ("tile", "ring") or self.team > 1)
        words += [self.layout if isinstance(self.layout, str) else "ranges"]
        return f"cp{self.degree}({', '.join(words)})"

    def check_heads(self, heads_q: int, heads_kv: int) -> None:
        """Raise PlanMismatch, listing legal degrees with their bytes, unless heads can be split."""
        legal = legal_ulysses(heads_q, heads_kv, self.degree)
        if self.ulysses in legal:
            return
        ways = [
            f"ulysses {u} x ring {self.degree // u} "
            f"({forward_blocks(u, 1, self.degree // u, heads_q, heads_kv):.4g} blocks forward)"
            for u in legal
        ]
        raise PlanMismatch(
            f"ulysses {self.ulysses} does not fit {heads_q} query and {heads_kv} key/value heads\n"
            "  why: each Ulysses rank owns whole heads, so ulysses divides the query heads, and "
            "divides or is a multiple of the key/value heads\n"
            f"  to fix: {', '.join(ways)}"
        )

    def wire(self, case: AttentionCase, passes: Sequence[str] = PASSES) -> Traffic:
        """Bytes that rank `case.rank` sends to others in one call, per phase, verb and axis.

        Raises PlanMismatch where heads do not fit, or the case is another plan's.
        """
        ranks = len(case.q_rows)
        if ranks != self.degree or not 0 <= case.rank < ranks:
            raise PlanMismatch(
                f"rank {case.rank} of a case of {ranks} ranks, the plan {self.short()} has "
                f"{self.degree}\n  to fix: AttentionCase.of(plan, rank=...) of this plan"
            )
        return schedule(self, case).traffic(passes)

    @classmethod
    def named(cls, name: str, ranks: int) -> Context:
        """A published point or one of ours, for `ranks` ranks.

        ring, double-ring(inner), kv-allgather, ulysses, usp(ulysses), startrail(team), tile(team),
        ulysses(u) x tile(team), pass-q. Published points neither prune nor return gradients to
        their owners at once. Raises PlanMismatch, listing names or legal degrees.
        """
        return _named(name, ranks)


def of_sequence(plan: object) -> Context:
    """The Context of a plan: itself, or the `cp` of a Plan. Raises PlanMismatch for all else."""
    context = getattr(plan, "cp", plan)
    if not isinstance(context, Context):
        raise PlanMismatch(
            f"plan {plan!r} is a {type(plan).__name__}; expected a Context or a Plan\n"
            "  to fix: Context(ring=...), or Context.named(name, ranks)"
        )
    return context


@lru_cache(maxsize=256)
def settled(plan: Context, *, causal: bool, documents: tuple[int, ...] | None = None) -> Context:
    """The plan with its layout decided once for all layers of a model.

    Tokens lie in one order from the first layer to the last, so a layer with a window or chunks
    must not choose another layout than one without. Packed documents get their ranges written out.
    """
    mask = Mask(causal=causal, documents=documents)
    layout = resolve_layout(plan.layout, 0, plan.degree, mask)
    if layout == "documents":
        if documents is None:
            layout = resolve_layout("auto", 0, plan.degree, mask)
        else:
            shards = shard(layout, sum(documents), plan.degree, mask)
            layout = tuple(rows.spans for rows in shards)
    return replace(plan, layout=layout)


def legal_ulysses(heads_q: int, heads_kv: int, ranks: int) -> list[int]:
    """Degrees that divide the ranks and split these heads into whole ones, ascending."""
    return [
        u for u in divisors(ranks) if heads_q % u == 0 and (heads_kv % u == 0 or u % heads_kv == 0)
    ]


def forward_blocks(u: int, a: int, b: int, heads_q: int, heads_kv: int) -> float:
    """Blocks a rank sends forward at ulysses u, team a, ring b; one block is its share of q.

    (2 + 2g)(u-1)/u + 2(a-1) + 2g(b-1), with g = key/value heads per query head, or u per query
    head where u exceeds the key/value heads.
    """
    g = max(u, heads_kv) / heads_q
    return (2 + 2 * g) * (u - 1) / u + 2 * (a - 1) + 2 * g * (b - 1)


def named_points(ranks: int, heads_q: int, heads_kv: int) -> dict[str, Context]:
    """Every legal named point of one level for `ranks` ranks and these heads, by name."""
    inner = [d for d in divisors(ranks) if 1 < d < ranks]
    names = ["ring", *(f"double-ring({d})" for d in inner), "kv-allgather", "ulysses"]
    names += [f"usp({d})" for d in inner]
    names += [f"startrail({d})" for d in inner if ranks % (d * d) == 0]
    names += [f"tile({d})" for d in inner]
    for u in inner:
        names += [f"ulysses({u}) x tile({a})" for a in divisors(ranks // u) if 1 < a < ranks // u]
    points = {name: _named(name, ranks) for name in [*names, "pass-q"]}
    legal = legal_ulysses(heads_q, heads_kv, ranks)
    return {name: point for name, point in points.items() if point.ulysses in legal}


_NAMES = (
    "ring, double-ring(inner), kv-allgather, ulysses, usp(ulysses), startrail(team), tile(team), "
    "ulysses(u) x tile(team), pass-q"
)


def _named(name: str, ranks: int) -> Context:
    if not isinstance(name, str):
        raise PlanMismatch(f"plan name {name!r} is a {type(name).__name__}; known are {_NAMES}")
    both = re.fullmatch(r"ulysses\((\d+)\) x tile\((\d+)\)", name)
    if both:
        u, a = map(int, both.groups())
        check_divides(f"{name}: ulysses x team", u * a, ranks)
        return Context(ulysses=u, team=a, ring=ranks // (u * a))
    one = re.fullmatch(r"([a-z-]+)(?:\((\d+)\))?", name)
    kind, degree = (one[1], int(one[2] or 0)) if one else ("", 0)
    published = Ring(gradients="ride", prune=False)
    plain = {
        "ring": lambda: Context(ring=ranks, schedule=published),
        "kv-allgather": lambda: Context(ring=ranks, schedule=Gather()),
        "ulysses": lambda: Context(ulysses=ranks),
        "pass-q": lambda: Context(team=ranks),
    }
    if kind in plain and not degree:
        return plain[kind]()
    split = {
        "double-ring": lambda rest: Context(
            ring=ranks, schedule=DoubleRing(inner=degree, prune=False)
        ),
        "usp": lambda rest: Context(ulysses=degree, ring=rest, schedule=published),
        "startrail": lambda rest: Context(team=degree, ring=rest, schedule=StarTrail()),
        "tile": lambda rest: Context(team=degree, ring=rest),
    }
    if kind not in split or not degree:
        raise PlanMismatch(f"no attention plan is named {name!r}; known are {_NAMES}")
    check_divides(name, degree, ranks)
    return split[kind](ranks // degree)
