"""The verbs on a plan: `estimate` gives numbers, `explain` gives the same in words."""

from __future__ import annotations

import os

from stretto.cluster.model import Cluster
from stretto.cost import explain as words
from stretto.cost.estimate import Estimate
from stretto.cost.estimate import estimate as cost_of
from stretto.errors import ConfigError
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.search.resolve import guess_error, resolve
from stretto.search.space import find_plans
from stretto.workload.denoise import flow_noise, noise_of
from stretto.workload.model import Workload

Path = str | os.PathLike[str]


def estimate(workload: Workload | Path, cluster: Cluster | Path, plan: Plan | Path) -> Estimate:
    """What a plan costs: seconds, bytes per rank and link, memory; a projection with interval.

    Takes nouns, files, or the name of a preset cluster. Projected seconds are the sum over windows
    of the slowest evaluation, the exchange at the link's rate and latency, and the replayed
    scheduler steps, plus encoding and decoding. Bytes are exactly those that the plan declares.
    Raises ConfigError, PlanMismatch.
    """
    workload = workload if isinstance(workload, Workload) else Workload.read(workload)
    cluster = cluster if isinstance(cluster, Cluster) else Cluster.read(cluster)
    plan = plan if isinstance(plan, Plan) else read_plan(plan)
    return cost_of(workload, cluster, plan, resolve(plan.step, noise_of(workload)))


def explain(
    plan: Plan | Path,
    workload: Workload | Path | None = None,
    cluster: Cluster | Path | None = None,
    *,
    diff: Plan | Path | None = None,
) -> str:
    """A plan in words: seconds by phase, bytes, hops, what limits it and what would be faster.

    `diff` sets a second plan beside it. Without workload and cluster: ranks and axes only.
    Raises ConfigError, PlanMismatch.
    """
    plan = plan if isinstance(plan, Plan) else read_plan(plan)
    other = read_plan(diff) if isinstance(diff, (str, os.PathLike)) else diff
    if workload is None or cluster is None:
        if workload is not None or cluster is not None:
            raise ConfigError("times need both a workload and a cluster, one of them is missing")
        return "\n\n".join(each.explain() for each in (plan, other) if each)
    workload = workload if isinstance(workload, Workload) else Workload.read(workload)
    cluster = cluster if isinstance(cluster, Cluster) else Cluster.read(cluster)
    found = estimate(workload, cluster, plan)
    text = words.render(found, workload, cluster)
    if other is not None:
        return text + "\n\n" + words.difference(found, estimate(workload, cluster, other))
    return text + "\n" + faster(found, workload, cluster)


def faster(found: Estimate, workload: Workload, cluster: Cluster) -> str:
    """What beats a plan on the same devices: the best exact plan, and the best of all.

    The expected guess error stands beside an approximate one, since less depth always is faster.
    """
    own, lines = guess_error(found.windows, noise_of(workload)), []
    for fidelity in ("exact", "approximate"):
        best = find_plans(workload, cluster, fidelity).choices[0]
        if best.estimate.seconds < found.seconds * 0.999:
            gain = found.seconds / best.estimate.seconds
            errors = f"guess error {best.guess_error:.2g} against {own:.2g} here"
            lines.append(f"  {best.plan}: {gain:.2f}x faster, {errors}")
    return "\n".join(["would be faster:", *(dict.fromkeys(lines) or ["  nothing that was tried"])])


def outline(plan: Plan, num_steps: int, shift: float = 1.0, guided_bytes: int | None = None) -> str:
    """A plan without a cluster: its windows on the flow grid, and the bytes of each step rank."""
    return words.outline(plan, resolve(plan.step, flow_noise(num_steps, shift)), guided_bytes)
