"""Plans for a workload on a cluster, in order of estimated time: cfg x step x window depth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

from stretto.cluster.model import Cluster
from stretto.cost.estimate import Estimate
from stretto.cost.estimate import estimate as cost_of
from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.model import Origin, Plan
from stretto.plan.options import Guidance, Steps, Tail
from stretto.quantities import short
from stretto.search import windows
from stretto.search.attention import TrainRanking, rank_plans
from stretto.search.resolve import guess_error, resolve
from stretto.workload.denoise import branches, noise_of
from stretto.workload.model import Workload, read_workload
from stretto.workload.train import Training

Path = str | os.PathLike[str]

Fidelity = Literal["exact", "approximate"]
#: Estimates closer than this, relatively, are one place in the ranking: no projection tells them
#: apart, and an exact plan must not lose to an approximate one by a latency.
TIE = 0.01


@dataclass(frozen=True)
class Choice:
    """A plan with its estimate. `guess_error` is relative, within one noise grid; 0 is exact."""

    plan: Plan
    estimate: Estimate
    guess_error: float

    @property
    def loses(self) -> bool:
        """Whether one device alone is as fast: every further rank is wasted on it."""
        return self.plan.world_size > 1 and self.estimate.speedup <= 1

    def ties(self, other: Choice) -> bool:
        """Whether no projection tells the two times apart."""
        times = self.estimate.seconds, other.estimate.seconds
        return max(times) <= (1 + TIE) * min(times)


@dataclass(frozen=True)
class Ranking:
    """Plans, fastest first; times within 1 % are ties: smaller guess error, then fewer ranks.

    `dropped`: (plan, why) of what was left out. `replica_seconds`: time per item when each device
    makes items of its own, which no plan for one item can beat in throughput by much.
    """

    choices: tuple[Choice, ...]
    dropped: tuple[tuple[Plan, str], ...]
    fidelity: Fidelity
    replica_seconds: float

    @property
    def best(self) -> Plan:
        """The first plan, with where it came from written into it."""
        first = self.choices[0]
        note = f"{first.estimate.seconds:.3g} s, {len(self.choices)} plans compared"
        origin = Origin(by=f"find_plans {self.fidelity}", basis="projected", note=note)
        return first.plan.model_copy(update={"origin": origin})

    def __str__(self) -> str:
        lines = [f"{'seconds':>10} {'speedup':>8} {'windows':>8} {'guess error':>12}  plan"]
        for place, choice in enumerate(self.choices):
            tie = place > 0 and choice.ties(self.choices[place - 1])
            note = " (tie)" * tie + " (loses to one device)" * choice.loses
            found = choice.estimate
            lines.append(
                f"{found.seconds:>10.4g} {found.speedup:>7.2f}x {len(found.windows):>8} "
                f"{choice.guess_error:>12.2g}  {choice.plan}{note}"
            )
        lines += [f"left out: {plan}: {why}" for plan, why in self.dropped]
        lines.append(f"a replica per device: {short('s', self.replica_seconds)} per item, exact")
        return "\n".join(lines)


@overload
def find_plans(
    workload: Training, cluster: Cluster | Path, fidelity: Fidelity = "exact"
) -> TrainRanking: ...
@overload
def find_plans(
    workload: Workload, cluster: Cluster | Path, fidelity: Fidelity = "exact"
) -> Ranking: ...
@overload
def find_plans(
    workload: Path, cluster: Cluster | Path, fidelity: Fidelity = "exact"
) -> Ranking | TrainRanking: ...
def find_plans(
    workload: Workload | Training | Path,
    cluster: Cluster | Path,
    fidelity: Fidelity = "exact",
) -> Ranking | TrainRanking:
    """Plans for a cluster's devices, in order of estimated seconds.

    Training: sequences over dp and over every attention plan of the rest, on all devices; all of
    them are exact. A generation: over all or some devices; "exact" splits guidance only,
    "approximate" adds step parallelism at the least depth, at that of the published schedule and
    half-way from there to sequential, none below `workload.limits.least_depth`. Plans that do not
    fit are in `dropped`, with the reason. Takes nouns, files or the name of a preset cluster.
    Raises ConfigError; Infeasible when no training plan fits into memory.
    """
    if fidelity not in ("exact", "approximate"):
        raise ConfigError(f"fidelity {fidelity!r} is unknown; known are 'exact' and 'approximate'")
    if not isinstance(workload, Workload | Training):
        workload = read_workload(workload)
    cluster = cluster if isinstance(cluster, Cluster) else Cluster.read(cluster)
    if isinstance(workload, Training):
        return rank_plans(workload, cluster)
    return _generation(workload, cluster, fidelity)


def _generation(workload: Workload, cluster: Cluster, fidelity: Fidelity) -> Ranking:
    choices, dropped = [], []
    for plan in candidates(workload, cluster.size, fidelity):
        try:
            choice = _judge(workload, cluster, plan)
        except PlanMismatch as error:
            dropped.append((plan, str(error).partition("\n")[0]))
            continue
        if choice.estimate.fits:
            choices.append(choice)
        else:
            dropped.append((plan, _shortage(workload, cluster, choice.estimate)))
    if not choices:
        raise ConfigError(f"no plan fits {cluster.name}: {dropped[0][1]}")
    alone = choices[0].estimate.sequential_seconds
    return Ranking(tuple(_ordered(choices)), tuple(dropped), fidelity, alone / cluster.size)


def candidates(workload: Workload, ranks: int, fidelity: Fidelity) -> Iterator[Plan]:
    """Every plan that is compared; the sequential one is always among them."""
    for cfg in range(1, min(branches(workload), ranks) + 1):
        yield Plan(cfg=Guidance(degree=cfg))
        if fidelity == "approximate":
            most = min(ranks // cfg, workload.steps)
            for step in range(2, most + 1):
                # Degrees that divide the ranks, and the largest: the ones between idle devices.
                if step == most or (ranks // cfg) % step == 0:
                    yield from _depths(workload, cfg, step)


def _depths(workload: Workload, cfg: int, step: int) -> Iterator[Plan]:
    default = windows.default_depth(workload.steps, step)
    least = workload.limits.least_depth
    wanted = {windows.least_depth(workload.steps, step), default, (default + workload.steps) // 2}
    for depth in sorted({min(max(depth, least), workload.steps) for depth in wanted}):
        steps = Steps(degree=step, windows=Tail(depth=depth))
        yield Plan(step=steps, cfg=Guidance(degree=cfg))


def _judge(workload: Workload, cluster: Cluster, plan: Plan) -> Choice:
    noise = noise_of(workload)
    sizes = resolve(plan.step, noise)
    return Choice(plan, cost_of(workload, cluster, plan, sizes), guess_error(sizes, noise))


def _ordered(choices: list[Choice]) -> Iterator[Choice]:
    """By time; a group that ties with its fastest, by guess error, ranks, time."""
    left = sorted(choices, key=lambda choice: choice.estimate.seconds)
    while left:
        group = [choice for choice in left if choice.ties(left[0])]
        yield from sorted(
            group, key=lambda c: (c.guess_error, c.plan.world_size, c.estimate.seconds)
        )
        left = left[len(group) :]


def _shortage(workload: Workload, cluster: Cluster, found: Estimate) -> str:
    assert found.memory_bytes is not None, "only known memory can be short"
    room = min(cluster.device(rank).memory for rank in range(found.plan.world_size))
    allowed = workload.limits.memory_fraction * room
    return (
        f"needs {found.memory_bytes / 2**30:.2f} GiB per rank, {allowed / 2**30:.2f} GiB are "
        f"allowed ({workload.limits.memory_fraction:g} of {room / 2**30:.2f} GiB)"
    )
