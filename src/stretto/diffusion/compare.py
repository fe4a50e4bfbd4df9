"""Methods side by side in one launch: sequential, fewer steps, the published schedule, ours.

They take turns on the same ranks, warm, several times over. A baseline that needs one rank runs on
rank 0 while the others sleep. What the table says of speed, cost and error is computed here.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stretto.diffusion import quality
from stretto.diffusion.clock import Clock
from stretto.diffusion.job import Outcome, Run
from stretto.diffusion.output import Media
from stretto.diffusion.worker import Worker, guides, step_plan, with_steps
from stretto.errors import SplitMismatch
from stretto.plan.model import Plan
from stretto.plan.options import Fixed, Guidance, Parastep, Steps

SEQUENTIAL, FEWER, PUBLISHED, OURS = "sequential", "fewer steps", "published parastep", "ours"
STEP_ALONE, CFG_ALONE = "step alone", "cfg alone"

#: (step degree, cfg degree) -> time of an exact step shared so, in sequential steps.
Costs = dict[tuple[int, int], float]


@dataclass(frozen=True, slots=True)
class Method:
    """A name and a plan; plan None is the untouched pipeline on one rank."""

    who: str
    plan: Plan | None


def methods(plan: Plan, steps: int, *, guided: bool) -> list[Method]:
    """What is compared with `plan`, at equal ranks; fewer steps comes later, when depth is known.

    Published: all ranks on steps, no guidance parallelism. Where the plan has a cfg axis, the step
    axis alone; where it has more than that and guidance is on, the cfg axis alone.
    """
    ranks = plan.world_size
    found = [Method(SEQUENTIAL, None), Method(OURS, plan)]
    if ranks <= steps:
        published = step_plan(ranks, windows=Parastep())
        found.append(Method(PUBLISHED, published))
        if plan.cfg.degree > 1:
            found.append(Method(STEP_ALONE, step_plan(ranks)))
    if guided and ranks % 2 == 0 and plan.step.degree > 1:
        # Every step exact: the step ranks repeat one another and add nothing.
        rest = Steps(degree=ranks // 2, windows=Fixed(warmup=steps), exact_split=False)
        found.append(Method(CFG_ALONE, Plan(cfg=2, step=rest if ranks > 2 else 1)))
    return found


def compare(worker: Worker) -> Outcome:
    """All methods on this rank, interleaved over the job's repeats."""
    job, plan = worker.job, worker.plan
    guided = guides(worker.pipe, job.call)
    compared = methods(plan, job.steps, guided=guided)
    outcome = Outcome(plan=plan, device=worker.device.type, runs=[])
    outcome.costs = _costs(worker, [m.plan for m in compared if m.plan])
    compared = _warm(worker, compared)
    for repeat in range(job.repeats):
        for method in compared:
            stage = f"{method.who} ({repeat + 1} of {job.repeats})"
            _merge(outcome.runs, worker.run(method.who, method.plan, job.steps, stage))
        ours = next(run for run in outcome.runs if run.who == OURS)
        assert ours.report is not None, "ours runs under a plan on every rank"
        steps = fewer_steps(job.steps, ours.report, depth_of(ours.report, plan, outcome.costs))
        stage = f"{FEWER} ({repeat + 1} of {job.repeats})"
        _merge(outcome.runs, worker.run(FEWER, None, steps, stage))
    outcome.floor = _floor(worker, outcome, compared)
    return outcome


def depth_of(report: dict, plan: Plan, costs: Costs) -> float:
    """Time of a run's windows in sequential steps, if exchange and guesses cost nothing.

    A window of several steps costs an evaluation with the batch cut over cfg; an exact step one
    with the batch cut over cfg and, where the plan says so, step. Cut batches at measured cost.
    """
    shared = plan.step.exact_split and plan.step.guesses != "own"
    exact = costs.get((plan.step.degree if shared else 1, plan.cfg.degree), 1.0)
    window = costs.get((1, plan.cfg.degree), 1.0)
    return sum(exact if part["size"] == 1 else window for part in report["windows"])


def fewer_steps(steps: int, report: dict, depth: float) -> int:
    """Steps to ask for so that a sequential run takes as long as a run of this depth.

    Depth counts steps of the scheduler. Heun's method takes two for most that are asked for: as
    many asked steps as the depth would be the whole sequential run again.
    """
    return max(1, round(steps * depth / report["steps"]))


# ---- on the ranks ----------------------------------------------------------------------------


def _merge(runs: list[Run], run: Run) -> None:
    """A repeat adds its seconds; pictures and reports stay those of the first."""
    for known in runs:
        if known.who == run.who:
            known.seconds += run.seconds
            return
    runs.append(run)


def _warm(worker: Worker, compared: Sequence[Method]) -> list[Method]:
    """Run everything shortly; leave out what cannot run on this pipeline."""
    left = []
    for method in compared:
        plan = method.plan
        degree = plan.step.degree if plan else 1
        short = min(worker.job.steps, degree + 2)
        if plan and degree > 1 and method.who in (CFG_ALONE, OURS):
            # Windows may be written for the full number of steps.
            warmup = short if method.who == CFG_ALONE else 2
            plan = with_steps(plan, windows=Fixed(warmup=warmup))
        run = worker.run(method.who, plan, short, f"warming up: {method.who}")
        # A scheduler of several evaluations per step takes more steps than asked: the exact
        # windows of cfg alone would then end too early.
        fits = run.report is None or run.report["steps"] == short
        if method.who != CFG_ALONE or degree == 1 or fits:
            left.append(method)
    return left


def _costs(worker: Worker, plans: Sequence[Plan]) -> Costs:
    """Measured on rank 0 alone, with virtual ranks; other ranks wait and return nothing."""
    worker.wait_for_all()
    costs: Costs = {(1, 1): 1.0}
    if worker.rank == 0:
        # The whole batch before and after the cut ones: the machine may be busier by then.
        before = _seconds_per_step(worker, 1, 1)
        cut: Costs = {}
        for degrees in sorted({d for plan in plans for d in _shares(plan)} - {(1, 1)}):
            with contextlib.suppress(SplitMismatch):
                cut[degrees] = _seconds_per_step(worker, *degrees)
        whole = (before + _seconds_per_step(worker, 1, 1)) / 2
        costs |= {degrees: seconds / whole for degrees, seconds in cut.items()}
    worker.wait_for_all()
    return costs


def _shares(plan: Plan) -> Iterator[tuple[int, int]]:
    yield 1, plan.cfg.degree
    if plan.step.exact_split and plan.step.guesses != "own":
        yield plan.step.degree, plan.cfg.degree


def _seconds_per_step(worker: Worker, step: int, cfg: int) -> float:
    """Denoiser seconds of a rank in an exact step whose batch is cut over `step` x `cfg` ranks."""
    steps = max(3, step)
    exact = Steps(degree=step, windows=Fixed(warmup=steps))
    plan = Plan(step=exact, cfg=Guidance(degree=cfg))
    with Clock(worker.pipe, worker.job.denoiser) as clock, worker.emulated(plan) as generate_once:
        # The first pass learns the form of outputs, which costs calls of its own.
        generate_once(steps)
        clock.seconds.clear()
        generate_once(steps)
    calls = len(clock.seconds) / (steps * step * cfg)
    return calls * statistics.median(clock.seconds)


def _floor(worker: Worker, outcome: Outcome, compared: Sequence[Method]) -> Media | None:
    """The sequential computation with its batch cut in two: what differs is rounding alone."""
    for method in compared:
        plan = method.plan
        if plan and plan.cfg.degree == 2 and (plan.step.degree == 1 or method.who == CFG_ALONE):
            run = next(run for run in outcome.runs if run.who == method.who)
            return run.media
    floor = None
    worker.wait_for_all()
    if worker.rank == 0:
        try:
            with worker.emulated(Plan(cfg=2)) as generate_once:
                floor = generate_once(worker.job.steps)
        except SplitMismatch:
            floor = None
    worker.wait_for_all()
    return floor


# ---- the table -------------------------------------------------------------------------------


def rows(outcomes: Sequence[Outcome], *, timed: bool = True) -> list[dict[str, Any]]:
    """One row of plain data per method, from what all ranks returned; rows we lose stay."""
    first = outcomes[0]
    reference = next((run for run in first.runs if run.who == SEQUENTIAL), None)
    total = next(run.report["steps"] for run in first.runs if run.who == OURS and run.report)
    found = []
    for run in first.runs:
        ranks = [_of(outcome, run.who) for outcome in outcomes]
        depth = _depth(run, reference, total, first.costs)
        row = _row(run, ranks, depth) | {"seconds": run.seconds if timed else []}
        found.append(row | _against(run, reference, total / depth, timed))
    return found


def _of(outcome: Outcome, who: str) -> Run:
    return next(run for run in outcome.runs if run.who == who)


def _depth(run: Run, reference: Run | None, total: int, costs: Costs) -> float:
    """In steps of the scheduler, of which the sequential run takes `total`."""
    if run.report and run.plan:
        return depth_of(run.report, run.plan, costs)
    return float(total) if reference is None else total * run.calls / reference.calls


def _row(run: Run, ranks: Sequence[Run], depth: float) -> dict[str, Any]:
    """What a method did. `steps` were asked for; `scheduler_steps` a scheduler made of them."""
    row: dict[str, Any] = {"who": run.who, "plan": run.plan_text, "steps": run.steps}
    reports = [r.report for r in ranks if r.report]
    if run.report and "ranks" in run.report:
        reports = run.report["ranks"]
    if run.report:
        row["scheduler_steps"] = run.report["steps"]
        row["windows"] = [part["size"] for part in run.report["windows"]]
        row["walk"] = run.report["walk"]
        row["worst_guess"] = max((p["error"] or 0.0 for p in run.report["windows"]), default=0.0)
    row["depth"] = depth
    row["evaluations"] = [r["evaluations"] for r in reports] or [run.calls]
    row["structure_calls"] = [r["structure_calls"] for r in reports] or [0]
    row["network_calls"] = [r["network_calls"] for r in reports] or [0]
    row["bytes_sent"] = [r["bytes_sent"] for r in reports] or [0]
    return row


def _against(run: Run, reference: Run | None, ceiling: float, timed: bool) -> dict[str, Any]:
    """What a row says beside the sequential run: nothing where there was none."""
    if reference is None:
        return {}
    found: dict[str, Any] = {"ceiling": ceiling}
    if timed:
        found |= speeds(run.seconds, reference.seconds, ceiling)
    return found | distance(run.media, reference.media)


def speeds(
    seconds: Sequence[float], sequential: Sequence[float], ceiling: float
) -> dict[str, float]:
    """Ratio of medians, and its share of what could be reached."""
    speedup = statistics.median(sequential) / statistics.median(seconds)
    return {
        "median_s": statistics.median(seconds),
        "speedup": speedup,
        "efficiency": speedup / ceiling,
    }


def distance(media: Media | None, reference: Media | None) -> dict[str, Any]:
    """PSNR in dB (None when the bits are equal) and relative L2 against the sequential result."""
    if media is None or reference is None or media.items.shape != reference.items.shape:
        return {}
    x, y = torch.from_numpy(media.items), torch.from_numpy(reference.items)
    found = quality.psnr(x, y, data_range=2.0 if media.kind == "audio" else 1.0)
    return {
        "identical": torch.equal(x, y),
        "psnr_db": found.average,
        "psnr_worst_item_db": found.worst_item,
        "relative_l2": quality.relative_l2(x, y),
    }
