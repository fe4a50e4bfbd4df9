"""Estimate: the time, bytes and memory of a plan, projected from a workload and a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stretto.cluster.model import Cluster, Device, Link
from stretto.cost.comm import groups, links_of, slowest_link
from stretto.cost.denoise import Windows, evaluation_seconds
from stretto.errors import PlanMismatch
from stretto.plan.model import Plan
from stretto.plan.traffic import Traffic
from stretto.workload.model import Workload

PHASES = ("encode", "evaluate", "exchange", "replay", "decode")
#: Relative uncertainty of a device where no `spread` is given: what 8 working slices of one
#: accelerator cost one another, 1 % on one day and 24 % on another (measured, 2026).
DEVICE_SPREAD = 0.25
#: The same for a link, and for an evaluation known only by its FLOP: either may be half as fast.
UNMEASURED_SPREAD = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one generation under a plan is expected to cost. Never more than a projection.

    `phases`: seconds by phase; `interval`: seconds, least and most. `depth`: evaluation time in
    sequential evaluations, so that `ceiling` = steps / depth is the speed-up if all else were
    free. `traffic`: bytes sent by each rank; `link_bytes`: their sum by slowest link of the group
    that exchanges them. `memory_bytes`: of the fullest rank, None where the model's is not known.
    `bottleneck`: the phase that takes most time.
    """

    plan: Plan
    windows: tuple[int, ...]
    phases: dict[str, float]
    interval: tuple[float, float]
    sequential_seconds: float
    depth: float
    traffic: tuple[Traffic, ...]
    link_bytes: dict[str, int]
    memory_bytes: int | None
    fits: bool
    basis: str = "projected"

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def bottleneck(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def speedup(self) -> float:
        """Over the same generation on the fastest device of the cluster alone."""
        return self.sequential_seconds / self.seconds if self.seconds else 1.0

    @property
    def ceiling(self) -> float:
        return sum(self.windows) / self.depth

    def as_dict(self) -> dict:
        """Plain data for a result file."""
        return {
            "plan": str(self.plan),
            "basis": self.basis,
            "seconds": self.seconds,
            "interval": list(self.interval),
            "phases": dict(self.phases),
            "sequential_seconds": self.sequential_seconds,
            "speedup": self.speedup,
            "ceiling": self.ceiling,
            "depth": self.depth,
            "windows": list(self.windows),
            "bytes_per_rank": [traffic.total() for traffic in self.traffic],
            "link_bytes": dict(self.link_bytes),
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "bottleneck": self.bottleneck,
        }


def estimate(workload: Workload, cluster: Cluster, plan: Plan, windows: Sequence[int]) -> Estimate:
    """What `plan` costs when its windows are `windows`, sizes in order that sum to the steps.

    Raises PlanMismatch: more ranks than devices, windows of other steps, a batch that cannot be
    cut; ConfigError: a dtype whose rate the cluster does not know.
    """
    _check(workload, cluster, plan, windows)
    model = Windows(workload, cluster, plan)
    phases = _phases(workload, model, windows)
    alone = min(evaluation_seconds(workload, cluster, rank) for rank in range(cluster.size))
    rest = workload.encode_seconds + workload.decode_seconds
    sequential = workload.steps * (alone + workload.step_seconds) + rest
    traffic = model.traffic(windows)
    memory = _memory(workload, plan)
    return Estimate(
        plan=plan,
        windows=tuple(windows),
        phases=phases,
        interval=_interval(workload, cluster, plan, phases),
        sequential_seconds=sequential,
        depth=phases["evaluate"] / alone,
        traffic=traffic,
        link_bytes=_link_bytes(cluster, plan, traffic),
        memory_bytes=memory,
        fits=memory is None or all(memory <= room for room in _room(workload, cluster, plan)),
    )


def _check(workload: Workload, cluster: Cluster, plan: Plan, windows: Sequence[int]) -> None:
    if plan.world_size > cluster.size:
        raise PlanMismatch(
            f"{plan} for {cluster.size} device(s) of {cluster.name}\n"
            "  why: each rank has a device of its own\n"
            f"  to fix: degrees whose product is at most {cluster.size}"
        )
    if sum(windows) != workload.steps or max(windows) > plan.step.degree:
        raise PlanMismatch(
            f"windows {' '.join(map(str, windows))} cover {sum(windows)} steps in sizes up to "
            f"{max(windows)}, the workload has {workload.steps} steps and the plan "
            f"step={plan.step.degree}"
        )


def _phases(workload: Workload, model: Windows, windows: Sequence[int]) -> dict[str, float]:
    phases = dict.fromkeys(PHASES, 0.0)
    phases["encode"], phases["decode"] = workload.encode_seconds, workload.decode_seconds
    for size, count in sorted(Counter(windows).items()):
        times = model.times(size)
        phases["evaluate"] += count * times.evaluate
        phases["exchange"] += count * times.exchange
        phases["replay"] += count * times.replay
    phases["exchange"] += model.report_seconds(workload.steps)
    return phases


def _interval(
    workload: Workload, cluster: Cluster, plan: Plan, phases: dict[str, float]
) -> tuple[float, float]:
    """From free exchange on devices at their best to all at its worst."""
    devices = [cluster.device(rank) for rank in range(plan.world_size)]
    device = max(_device_spread(workload, each) for each in devices)
    everyone = [group for axis in plan.sizes for group in groups(plan, axis)]
    links = [link for group in everyone for link in links_of(cluster, group)]
    link = max((_link_spread(each) for each in links), default=0.0)
    fixed = phases["encode"] + phases["replay"] + phases["decode"]
    least = fixed + phases["evaluate"] / (1 + device)
    return least, fixed + phases["evaluate"] * (1 + device) + phases["exchange"] * (1 + link)


def _device_spread(workload: Workload, device: Device) -> float:
    if workload.evaluation.seconds is None:
        return UNMEASURED_SPREAD
    return DEVICE_SPREAD if device.spread is None else device.spread


def _link_spread(link: Link) -> float:
    return UNMEASURED_SPREAD if link.spread is None else link.spread


def _link_bytes(cluster: Cluster, plan: Plan, traffic: Sequence[Traffic]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for axis in plan.sizes:
        for group in groups(plan, axis):
            sent = sum(traffic[rank].total(axis=axis) for rank in group)
            found[slowest_link(cluster, group).name] += sent
    return dict(found)


def _memory(workload: Workload, plan: Plan) -> int | None:
    """The model, and the predictions of one window that a rank gathers."""
    model = workload.evaluation.memory_bytes
    return None if model is None else model + plan.step.degree * workload.guided_bytes


def _room(workload: Workload, cluster: Cluster, plan: Plan) -> list[float]:
    fraction = workload.limits.memory_fraction
    return [fraction * cluster.device(rank).memory for rank in range(plan.world_size)]
