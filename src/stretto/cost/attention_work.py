"""How many (query, key) pairs the busiest rank computes in each step of a plan's walk."""

from __future__ import annotations

from functools import lru_cache

from stretto.plan.options import Context, Gather, StarTrail
from stretto.plan.ranges import Layout, Mask, Spans, count, resolve_layout, shard

Matrix = tuple[tuple[int, ...], ...]


def step_pairs(context: Context, tokens: int, mask: Mask) -> list[float]:
    """Pairs of the busiest rank in each step, for one head of one sequence.

    Full masks and zigzagged causal ones are even by construction, for all others pairs of
    shards are counted.
    """
    layout = resolve_layout(context.layout, tokens, context.degree, mask)
    if even(layout, mask):
        return _even(context, tokens, mask)
    return _counted(context, pair_matrix(layout, tokens, context.degree, mask))


def even(layout: Layout, mask: Mask) -> bool:
    """Whether all ranks have equal work in all steps, but for rounding."""
    if mask.window is not None or mask.documents is not None or mask.prefix:
        return False
    return layout == "zigzag" or (not mask.causal and isinstance(layout, str))


def _even(context: Context, tokens: int, mask: Mask) -> list[float]:
    pairs = tokens * tokens / (2 if mask.causal else 1)
    steps = _num_steps(context)
    # A rank has 1 / ulysses of the heads, and with them ulysses times the pairs.
    return [pairs * context.ulysses / context.degree / steps] * steps


def _num_steps(context: Context) -> int:
    if isinstance(context.schedule, Gather):
        return 1
    if isinstance(context.schedule, StarTrail):
        return context.ring // context.team
    return context.ring


@lru_cache(maxsize=64)
def pair_matrix(layout: Layout, tokens: int, ranks: int, mask: Mask) -> Matrix:
    """Visible pairs between the queries of every logical rank and the keys of every other."""
    shards = shard(layout, tokens, ranks, mask)
    return tuple(tuple(_count(mask, q, k) for k in shards) for q in shards)


def _count(mask: Mask, q: Spans, k: Spans) -> int:
    return count(mask, q, k) if q and k else 0


def _counted(context: Context, work: Matrix) -> list[float]:
    u, a, b = context.ulysses, context.team, context.ring
    # By (ring, team) position: Ulysses ranks pool their rows and share the heads.
    cells = [
        [sum(work[i * u + x][j * u + y] for x in range(u) for y in range(u)) for j in range(a * b)]
        for i in range(a * b)
    ]
    teams = [[sum(cells[r * a + t][j] for t in range(a)) for j in range(a * b)] for r in range(b)]
    if isinstance(context.schedule, Gather):
        return [float(max(sum(row) for row in teams))]
    if isinstance(context.schedule, StarTrail):
        return _startrail(teams, a, b)
    order = _offsets(context)
    return [
        float(max(teams[r][_owner(r, offset, context) * a + t] for r in range(b) for t in range(a)))
        for offset in order
    ]


def _offsets(context: Context) -> list[tuple[int, int]]:
    """(outer, inner) distances in the order in which blocks arrive."""
    inner = context.inner[1] if context.two_level else context.ring
    return [(outer, here) for outer in range(context.ring // inner) for here in range(inner)]


def _owner(ring: int, offset: tuple[int, int], context: Context) -> int:
    inner = context.inner[1] if context.two_level else context.ring
    outer, here = divmod(ring, inner)
    return (outer + offset[0]) % (context.ring // inner) * inner + (here + offset[1]) % inner


def _startrail(teams: list[list[int]], c: int, b: int) -> list[float]:
    """Rank (t, m) holds the keys of team ((t*C + m) mod T) - s*C at step s."""
    found = []
    for step in range(b // c):
        pairs = []
        for team in range(b):
            for member in range(c):
                held = ((team * c + member) % b - step * c) % b
                pairs.append(sum(teams[team][held * c + m] for m in range(c)))
        found.append(float(max(pairs)))
    return found
