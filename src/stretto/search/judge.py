"""The verbs on a plan: `estimate` gives numbers, `explain` gives the same in words."""

from __future__ import annotations

import os
from typing import overload

from stretto.cluster.model import Cluster
from stretto.cost import explain as words
from stretto.cost import train_words
from stretto.cost.estimate import Estimate
from stretto.cost.estimate import estimate as cost_of
from stretto.cost.train import TrainEstimate
from stretto.cost.train import estimate as cost_of_training
from stretto.errors import ConfigError, Infeasible
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import Context
from stretto.quantities import short
from stretto.search.attention import rank_plans
from stretto.search.resolve import guess_error, resolve
from stretto.search.space import find_plans
from stretto.workload.denoise import flow_noise, noise_of
from stretto.workload.model import Workload, read_workload
from stretto.workload.train import Training

Path = str | os.PathLike[str]


@overload
def estimate(workload: Workload, cluster: Cluster | Path, plan: Plan | Path) -> Estimate: ...
@overload
def estimate(workload: Training, cluster: Cluster | Path, plan: Plan | Path) -> TrainEstimate: ...
@overload
def estimate(
    workload: Path, cluster: Cluster | Path, plan: Plan | Path
) -> Estimate | TrainEstimate: ...
def estimate(
    workload: Workload | Training | Path, cluster: Cluster | Path, plan: Plan | Path
) -> Estimate | TrainEstimate:
    """What a plan costs: seconds, bytes per rank and link, memory; a projection with interval.

    Takes nouns, files, or the name of a preset cluster. A generation's projected seconds are the
    sum over windows of the slowest evaluation, the exchange at the link's rate and latency, and
    the replayed scheduler steps, plus encoding and decoding; bytes are exactly those that the plan
    declares. A training step's are attention (heads, rows, and over the steps of the walk the
    slower of kernel and hop) and the other layers. Raises ConfigError, PlanMismatch.
    """
    workload, cluster, plan = _nouns(workload, cluster, plan)
    if isinstance(workload, Training):
        return cost_of_training(workload, cluster, plan)
    return cost_of(workload, cluster, plan, resolve(plan.step, noise_of(workload)))


def explain(
    plan: Plan | Context | Path,
    workload: Workload | Training | Path | None = None,
    cluster: Cluster | Path | None = None,
    *,
    diff: Plan | Context | Path | None = None,
) -> str:
    """A plan in words: seconds by phase, bytes, hops, what limits it and what would be faster.

    `diff` sets a second plan beside it. Without workload and cluster: ranks and axes, of a
    training plan its phases in blocks; with a training workload alone: its exact bytes. A Context
    is the training plan of its own ranks. Raises ConfigError, PlanMismatch.
    """
    plan = _plan(plan)
    other = _plan(diff) if diff is not None else None
    both = [each for each in (plan, other) if each]
    if workload is None and cluster is None:
        return "\n\n".join(_plain(each) for each in both)
    workload = _workload(workload, *both) if workload is not None else None
    if isinstance(workload, Training) and cluster is None:
        return "\n\n".join(train_words.without_cluster(workload, each) for each in both)
    if workload is None or cluster is None:
        raise ConfigError("times need both a workload and a cluster, one of them is missing")
    cluster = cluster if isinstance(cluster, Cluster) else Cluster.read(cluster)
    if isinstance(workload, Training):
        return _explain_training(workload, cluster, plan, other)
    found = estimate(workload, cluster, plan)
    text = words.render(found, workload, cluster)
    if other is not None:
        return text + "\n\n" + words.difference(found, estimate(workload, cluster, other))
    return text + "\n" + faster(found, workload, cluster)


def _plain(plan: Plan) -> str:
    return train_words.outline(plan) if plan.kind == "train" else plan.explain()


def _explain_training(training: Training, cluster: Cluster, plan: Plan, other: Plan | None) -> str:
    found = cost_of_training(training, cluster, plan)
    text = train_words.render(found, training, cluster)
    if other is not None:
        second = cost_of_training(training, cluster, other)
        return text + "\n\n" + train_words.difference(found, second)
    return text + "\n" + faster_training(found, training, cluster)


def faster_training(found: TrainEstimate, training: Training, cluster: Cluster) -> str:
    """What beats a training plan on as many devices, and how much a plan must give up to fit."""
    lines = []
    try:
        best = rank_plans(training, cluster, ranks=found.plan.world_size).choices[0]
    except Infeasible as error:
        return f"nothing fits: {error}"
    if not found.fits:
        lines.append(f"  fits: {best.plan}, {short('s', best.estimate.seconds)} a step")
    elif best.estimate.seconds < found.seconds * 0.999:
        gain = found.seconds / best.estimate.seconds
        more = (best.estimate.memory.total - found.memory.total) / 2**30
        lines.append(f"  {best.plan}: {gain:.2f}x faster, {more:+.2f} GiB per rank")
    return "\n".join(["would be faster:", *(lines or ["  nothing that was tried"])])


def _nouns(
    workload: Workload | Training | Path, cluster: Cluster | Path, plan: Plan | Path
) -> tuple[Workload | Training, Cluster, Plan]:
    cluster = cluster if isinstance(cluster, Cluster) else Cluster.read(cluster)
    plan = _plan(plan)
    return _workload(workload, plan), cluster, plan


def _plan(plan: Plan | Context | Path) -> Plan:
    if isinstance(plan, Context):
        return Plan(kind="train", cp=plan)
    return plan if isinstance(plan, Plan) else read_plan(plan)


def _workload(workload: Workload | Training | Path, *plans: Plan) -> Workload | Training:
    """The workload of plans of its own kind. Raises ConfigError for others."""
    job = workload if isinstance(workload, Workload | Training) else read_workload(workload)
    kind = "train" if isinstance(job, Training) else "generate"
    others = [plan for plan in plans if plan.kind != kind]
    if others:
        raise ConfigError(
            f"{others[0]}: a plan to {others[0].kind}, and the workload is one to {kind}\n"
            f"  to fix: Plan(kind={kind!r}, ...), or a workload to {others[0].kind}"
        )
    return job


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
