"""Plans for a training step on a cluster, in order of estimated seconds: dp x attention plans.

Named points of one level, and every tile of two levels that a cluster's nodes allow, each with
what backward may keep. Bytes and times are closed forms, so thousands of plans take seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stretto import axes
from stretto.cluster.model import Cluster
from stretto.cost.train import TrainEstimate, bound, estimate
from stretto.errors import Infeasible
from stretto.plan.checks import check_divides, divisors
from stretto.plan.context import legal_ulysses, named_points
from stretto.plan.model import Origin, Placement, Plan
from stretto.plan.options import Context, Data, DoubleRing, Gather, Schedule, StarTrail, Tile
from stretto.quantities import short
from stretto.workload.train import Training

#: Estimates closer than this, relatively, are one place in the ranking, and fewer bytes decide:
#: less than the four digits that a table shows.
TIE = 0.0005
_STARTRAILS = (
    StarTrail(circulate="q"),
    StarTrail(circulate="q", keep="far"),
    StarTrail(circulate="kv"),
    StarTrail(circulate="kv", keep="far"),
)


@dataclass(frozen=True)
class TrainChoice:
    """A plan with its estimate; `name`: the published or named point that it is, if any."""

    plan: Plan
    estimate: TrainEstimate
    name: str = ""

    def ties(self, other: TrainChoice) -> bool:
        """Whether no projection tells the two times apart."""
        times = self.estimate.seconds, other.estimate.seconds
        return max(times) <= (1 + TIE) * min(times)


@dataclass(frozen=True)
class TrainRanking:
    """Plans that fit, fastest first; times within 0.05 % are ties: fewer bytes through an
    interface, less memory, fewer bytes sent.

    `dropped`: (plan, why) of what does not fit. The first choice is what `auto` means.
    """

    choices: tuple[TrainChoice, ...]
    dropped: tuple[tuple[TrainChoice, str], ...]
    training: Training
    cluster: Cluster

    @property
    def best(self) -> Plan:
        """The first plan, with where it came from written into it."""
        first = self.choices[0]
        note = f"{first.estimate.seconds:.3g} s, {len(self.choices)} plans compared"
        origin = Origin(by="find_plans", basis="projected", note=note)
        return first.plan.model_copy(update={"origin": origin})

    def named(self) -> tuple[TrainChoice, ...]:
        """The best choice of each family of named points, in order."""
        seen: dict[str, TrainChoice] = {}
        for choice in self.choices:
            if choice.name:
                seen.setdefault(re.sub(r"\(\d+\)", "", choice.name), choice)
        return tuple(seen.values())

    def __str__(self) -> str:
        return "\n".join(row for row in table(self))


def table(ranking: TrainRanking, most: int = 12) -> list[str]:
    """The first choices as lines of a table, then the named points below them."""
    shown = list(ranking.choices[:most])
    below = [each for each in ranking.named() if each not in shown]
    head = f"{'step':>10} {'attention':>10} {'sent/rank':>10} {'interface':>10} {'memory':>9}  plan"
    lines = [head, *(_row(each) for each in shown)]
    if below:
        lines += [
            "the best of each named family that is not above:",
            *(_row(each) for each in below),
        ]
    if ranking.dropped:
        choice, why = min(ranking.dropped, key=lambda pair: pair[0].estimate.memory.total)
        lines.append(f"left out for memory: {len(ranking.dropped)}, nearest {choice.plan}: {why}")
    return lines


def _row(choice: TrainChoice) -> str:
    found = choice.estimate
    numbers = (
        short("s", found.seconds),
        short("s", found.attention_seconds),
        short("B", found.sent_bytes),
        short("B", found.interface_bytes),
        f"{found.memory.total / 2**30:.1f} GiB",
    )
    name = f"  ({choice.name})" if choice.name else ""
    cells = [f"{text:>10}" for text in numbers[:-1]] + [f"{numbers[-1]:>9}"]
    return f"{' '.join(cells)}  {choice.plan}{name}"


def rank_plans(
    training: Training, cluster: Cluster, *, ranks: int | None = None, micro_batch: int = 1
) -> TrainRanking:
    """Every legal plan for `ranks` devices of a cluster (all of them by default), fastest first.

    Each takes `micro_batch` sequences at once. Groups whose sequences those do not divide are left
    out.
    Raises Infeasible when none fits: by how much the leanest exceeds memory; ConfigError for a
    dtype whose rate the cluster does not know; PlanMismatch as `candidates`.
    """
    used = cluster.first(ranks or cluster.size)
    choices, dropped = [], []
    for plan, name in candidates(training, used, micro_batch):
        choice = TrainChoice(plan, estimate(training, used, plan), name)
        if choice.estimate.fits:
            choices.append(choice)
        else:
            dropped.append((choice, shortage(choice.estimate)))
    if not choices:
        raise Infeasible(_none_fits(training, used, dropped))
    return TrainRanking(tuple(_ordered(choices)), tuple(dropped), training, used)


def candidates(
    training: Training, cluster: Cluster, micro_batch: int = 1
) -> Iterator[tuple[Plan, str]]:
    """(plan, name) of all plans for the whole cluster; the name of a named point, else "".

    Raises PlanMismatch for micro-batches that do not divide the sequences of a step.
    """
    inside = node_size(cluster)
    check_divides("micro-batch", micro_batch, training.sequences)
    for dp in divisors(math.gcd(training.sequences // micro_batch, cluster.size)):
        seen: set[Context] = set()
        for context, name in contexts(training, cluster, cluster.size // dp):
            if context in seen:
                continue
            seen.add(context)
            plan = Plan(kind="train", dp=Data(shard=dp, micro_batch=micro_batch), cp=context)
            yield plan, name
            if context.degree > inside:
                for placement in placements(context):
                    yield plan.model_copy(update={"placement": placement}), ""


def placements(context: Context) -> Iterator[Placement]:
    """Other orders of a plan of one level: each of its axes across nodes, the others inside.

    Plans of two levels name their orders themselves.
    """
    if context.two_level:
        return
    used = [axis for axis, size in axes.ordered(context.sizes).items() if size > 1]
    for outermost in used[1:]:
        rest = (axis for axis in used if axis != outermost)
        yield Placement(order=(outermost, *rest))


def contexts(training: Training, cluster: Cluster, ranks: int) -> Iterator[tuple[Context, str]]:
    """Attention plans for `ranks` ranks that sit side by side on the cluster."""
    heads, kv_heads = training.arch.heads, training.arch.kv_heads
    if ranks == 1:
        yield Context(), ""
        return
    for layout in _layouts(training, ranks):
        for name, context in named_points(ranks, heads, kv_heads).items():
            yield replace(context, layout=layout), name
        for context in _one_level(ranks, heads, kv_heads):
            yield replace(context, layout=layout), ""
        for context in _two_levels(cluster, ranks, heads, kv_heads):
            yield replace(context, layout=layout), ""


def _layouts(training: Training, ranks: int) -> list[str]:
    """What `auto` means first; others only where the best is not known beforehand."""
    if training.seen is None and training.documents is None:
        return ["auto"]
    others = ["zigzag"] if training.documents is not None else ["zigzag", "contiguous"]
    meant = bound(training, Context(ring=ranks)).layout
    return ["auto", *(name for name in others if name != meant and training.arch.causal)]


def _one_level(ranks: int, heads: int, kv_heads: int) -> Iterator[Context]:
    """Every u x a x b with the schedules that it allows, and what backward keeps."""
    for u in legal_ulysses(heads, kv_heads, ranks):
        for a in divisors(ranks // u):
            b = ranks // u // a
            for schedule in _schedules(a, b):
                yield Context(ulysses=u, team=a, ring=b, schedule=schedule)


def _schedules(team: int, ring: int) -> Iterator[Schedule]:
    """Of one level."""
    yield Tile()
    if ring > 1:
        yield Tile(keep="all")
    if team == 1 and ring > 1:
        yield from (Gather(), Gather(keep="all"))
    if team > 1 and ring % team == 0:
        yield from _STARTRAILS


def _two_levels(cluster: Cluster, ranks: int, heads: int, kv_heads: int) -> Iterator[Context]:
    """Tiles whose outer degrees are the nodes of a group and whose inner ones fill a node."""
    inside = node_size(cluster)
    if inside <= 1 or ranks <= inside or ranks % inside:
        return
    nodes = ranks // inside
    for u in legal_ulysses(heads, kv_heads, inside):
        for team_in in divisors(inside // u):
            ring_in = inside // u // team_in
            for team_out in divisors(nodes):
                degrees = (u, team_out * team_in, nodes // team_out * ring_in)
                yield from _levels(degrees, team_in, ring_in)


def _levels(degrees: tuple[int, int, int], team_in: int, ring_in: int) -> Iterator[Context]:
    ulysses, team, ring = degrees
    if team_in == team and ring_in == 1:
        return  # the same moves as a plan of one level
    inner = {"team_inner": team_in, "ring_inner": ring_in}
    schedules: list[Schedule] = [Tile(**inner)]
    schedules += [Tile(**inner, keep="far")] * (ring > ring_in)
    schedules += [Tile(**inner, keep="all")] * (ring_in > 1)
    schedules += [DoubleRing(inner=ring_in)] * (team == 1 and 1 < ring_in < ring)
    for schedule in schedules:
        yield Context(ulysses=ulysses, team=team, ring=ring, schedule=schedule)


def node_size(cluster: Cluster) -> int:
    """Devices of each node, 0 where nodes differ."""
    sizes = {node.devices[1] for node in cluster.nodes}
    return sizes.pop() if len(sizes) == 1 else 0


def _ordered(choices: list[TrainChoice]) -> Iterator[TrainChoice]:
    """By time; a group that ties with its fastest by interface bytes, then memory."""
    left = sorted(choices, key=lambda choice: choice.estimate.seconds)
    while left:
        group = [choice for choice in left if choice.ties(left[0])]
        yield from sorted(group, key=_quieter)
        left = left[len(group) :]


def _quieter(choice: TrainChoice) -> tuple:
    found = choice.estimate
    return found.interface_bytes, found.memory.total, found.sent_bytes, found.seconds


def shortage(found: TrainEstimate) -> str:
    """By how much a plan exceeds memory."""
    need, gib = found.memory.total, 2**30
    return (
        f"needs {need / gib:.2f} GiB per rank, {(need - found.room) / gib:.2f} GiB more than the "
        f"{found.room / gib:.2f} GiB allowed"
    )


def _none_fits(training: Training, cluster: Cluster, dropped: list[tuple[TrainChoice, str]]) -> str:
    leanest, why = min(dropped, key=lambda pair: pair[0].estimate.memory.total)
    memory = leanest.estimate.memory.as_dict()
    largest = max(memory, key=lambda name: memory[name])
    return (
        f"no plan for {training.model} at {training.tokens} tokens fits {cluster.name}\n"
        f"  why: the leanest, {leanest.plan}, {why}; most of it is {largest}, "
        f"{memory[largest] / 2**30:.2f} GiB\n"
        f"  to fix: {_way_out(training, leanest.estimate)}"
    )


def _way_out(training: Training, found: TrainEstimate) -> str:
    """Fewer tokens where those make the difference, else more devices."""
    memory = found.memory
    fixed = memory.states + memory.weights
    if fixed >= found.room:
        return "more devices to spread the model's states over, or fewer bytes of state"
    tokens = int(training.tokens * (found.room - fixed) / (memory.total - fixed))
    return f"sequences of about {tokens} tokens, or more devices"
