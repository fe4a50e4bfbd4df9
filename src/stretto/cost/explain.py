"""An estimate in words: where the seconds go, what limits them, where one device does better."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.cluster.model import Cluster
from stretto.cost.comm import groups, links_of
from stretto.cost.estimate import PHASES, Estimate
from stretto.plan.model import Plan
from stretto.plan.options import StepsCase
from stretto.quantities import short
from stretto.workload.denoise import branches
from stretto.workload.model import Workload

#: At or below this many steps the exact first steps leave too little to parallelize.
FEW_STEPS = 8


def render(found: Estimate, workload: Workload, cluster: Cluster) -> str:
    """The text of `stretto explain` for one plan on one cluster."""
    low, high = found.interval
    lines = [
        f"{found.plan} on {cluster.name}",
        f"  {found.seconds:.4g} s ({low:.3g} to {high:.3g}), {found.speedup:.2f}x one device "
        f"({found.sequential_seconds:.4g} s), ceiling {found.ceiling:.2f}x; {found.basis} from a "
        f"{cluster.basis} cluster",
        *_phase_lines(found),
        f"  {len(found.windows)} windows: {' '.join(map(str, found.windows))}",
        *_byte_lines(found),
        *_hop_lines(found.plan, cluster),
        *_memory_lines(found),
        *(f"  note: {warning}" for warning in warnings(found, workload, cluster)),
    ]
    return "\n".join(lines)


def difference(found: Estimate, other: Estimate) -> str:
    """Two plans side by side, phase by phase; the last column is second minus first."""
    rows = [(name, found.phases[name], other.phases[name]) for name in PHASES]
    rows.append(("total", found.seconds, other.seconds))
    lines = [f"first:  {found.plan}", f"second: {other.plan}"]
    lines += [f"  {name:<9} {a:>10.4g} s {b:>10.4g} s {b - a:>+10.4g} s" for name, a, b in rows]
    sent = [sum(traffic.total() for traffic in each.traffic) for each in (found, other)]
    lines.append(f"  {'bytes':<9} {sent[0]:>10} B {sent[1]:>10} B {sent[1] - sent[0]:>+10} B")
    lines.append(f"  {'windows':<9} {len(found.windows):>10}   {len(other.windows):>10}")
    return "\n".join(lines)


def outline(plan: Plan, windows: Sequence[int], guided_bytes: int | None) -> str:
    """Ranks, axes and windows of a plan, and exact bytes where a prediction's size is given."""
    lines = [
        plan.explain(),
        f"  {len(windows)} windows for {sum(windows)} steps: {' '.join(map(str, windows))}",
        f"  ceiling {sum(windows) / len(windows):.2f}x from the step axis",
    ]
    for rank in range(plan.step.degree if guided_bytes is not None else 0):
        traffic = plan.step.wire(StepsCase(tuple(windows), rank, guided_bytes or 0))
        lanes = [f"{lane.phase} by {lane.verb} {num}" for lane, num in traffic]
        sent = ", ".join(lanes) or "nothing"
        lines.append(f"  step rank {rank} sends {traffic.total()} bytes ({sent})")
    if guided_bytes is not None and (plan.cfg.degree > 1 or plan.step.degree > 1):
        lines.append("  besides: guidance and shared exact steps, which need a --workload")
    return "\n".join(lines)


def warnings(found: Estimate, workload: Workload, cluster: Cluster) -> list[str]:
    """Where this plan is the wrong one, with the numbers."""
    lines = []
    plan, ranks = found.plan, found.plan.world_size
    if plan.step.degree > 1 and workload.steps <= FEW_STEPS:
        lines.append(
            f"{workload.steps} steps are few for step parallelism ({FEW_STEPS} or fewer): the "
            f"exact steps at both ends leave a ceiling of {found.ceiling:.2f}x"
        )
    if found.phases["exchange"] > found.phases["evaluate"]:
        lines.append(
            f"the link takes longer than the model: {found.phases['exchange']:.3g} s against "
            f"{found.phases['evaluate']:.3g} s; fewer step ranks or a faster link"
        )
    if ranks > 1 and found.speedup <= 1:
        lines.append(f"one device alone is as fast: {found.sequential_seconds:.4g} s")
    if ranks > 1 and found.speedup < ranks:
        items = found.sequential_seconds / ranks
        lines.append(
            f"for many items a replica on each of {ranks} devices takes {items:.4g} s per item "
            f"and is exact, this plan {found.seconds:.4g} s"
        )
    if plan.step.degree > 1 and plan.cfg.degree == 1 and branches(workload) == 2 and ranks > 1:
        lines.append("guidance is on and not split: cfg=2 is exact, step parallelism is not")
    if not found.fits:
        lines.append(
            f"does not fit: more than {workload.limits.memory_fraction:g} of the memory of "
            f"{cluster.name}"
        )
    return lines


def _phase_lines(found: Estimate) -> list[str]:
    lines = []
    for name in PHASES:
        seconds = found.phases[name]
        part = seconds / found.seconds if found.seconds else 0.0
        limit = "  <- limits" if name == found.bottleneck else ""
        lines.append(f"  {name:<9} {short('s', seconds):>10} {part:>6.1%}{limit}")
    return lines


def _byte_lines(found: Estimate) -> list[str]:
    sent = [traffic.total() for traffic in found.traffic]
    lines = [f"  bytes sent per rank: {min(sent)} to {max(sent)}, {sum(sent)} in all"]
    return lines + [f"  over {link}: {num} bytes" for link, num in found.link_bytes.items()]


def _hop_lines(plan: Plan, cluster: Cluster) -> list[str]:
    """Each axis with the links its groups talk over."""
    lines = []
    for axis, size in plan.sizes.items():
        for link in dict.fromkeys(k for g in groups(plan, axis) for k in links_of(cluster, g)):
            lines.append(
                f"  axis {axis}: {size} ranks, {link.name}, {short('B/s', link.rate)}, "
                f"{short('s', link.latency)} a hop"
            )
    return lines


def _memory_lines(found: Estimate) -> list[str]:
    if found.memory_bytes is None:
        return ["  memory: not known, the workload does not say"]
    return [f"  memory: {found.memory_bytes / 2**30:.2f} GiB per rank"]
