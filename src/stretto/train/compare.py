"""One rank beside several on the same samples: losses, times, and what bounds them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stretto.mesh.launch import OnNote, Tell, launch
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.train.job import WARMUP_STEPS, Job, Outcome, Rank, own_group, run

#: Imported once by the server that ranks are forked from.
PRELOAD = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "stretto.parallel.api",
    "stretto.train.compare",
)
#: Steps of the independent runs that show what the machine leaves several ranks.
CEILING_STEPS = 8
_ALONE = Plan(kind="train")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outcomes of rank 0: one rank alone, and the ranks of the plan; steps of independent runs.

    `apart`: of each of as many processes as the plan has ranks, all at once, each with the whole
    recipe to itself.
    """

    alone: Outcome
    ours: Outcome
    apart: list[Outcome]


def start(job: Job, *, threads: int = 1, on_note: OnNote | None = None) -> list[Outcome]:
    """Train on ranks started here; outcomes in rank order."""
    return launch(
        run,
        job,
        ranks=job.plan.world_size,
        timeout_s=job.timeout_s,
        threads=threads,
        preload=PRELOAD,
        on_note=on_note,
    )


def compare(
    job: Job, *, threads: int = 1, on_note: OnNote | None = None
) -> tuple[Comparison, list[Outcome]]:
    """Run the recipe on one rank and on the plan's; both, and all outcomes of the plan's ranks."""
    one = replace(job, plan=_ALONE, out=None, resume=False)
    alone = start(one, threads=threads, on_note=on_note)[0]
    ours = start(job, threads=threads, on_note=on_note)
    few = replace(one, until=min(CEILING_STEPS, job.recipe.steps), validate=0)
    apart = launch(
        run_apart,
        few,
        ranks=job.plan.world_size,
        timeout_s=job.timeout_s,
        threads=threads,
        preload=PRELOAD,
        on_note=on_note,
    )
    return Comparison(alone, ours[0], apart), ours


def run_apart(tell: Tell, job: Job) -> Outcome:
    """A rank that has nothing to do with the others started beside it."""
    with own_group(job):
        mesh = LocalWorld(job.plan.sizes, device=job.device or "cpu").mesh(0)
        return Rank(tell, job, mesh).run()


def figures(found: Comparison, ranks: int) -> dict[str, Any]:
    """Loss differences, speed-up and ceilings.

    `ceiling`: what as many independent runs reach at once on this machine, in runs per time of
    one; `ceiling_ideal`: the number of ranks.
    """
    apart = statistics.median(outcome.seconds for outcome in found.apart)
    ceiling = ranks * found.alone.seconds / apart
    speedup = found.alone.seconds / found.ours.seconds
    return {
        "loss_difference": loss_difference(found.alone, found.ours),
        "held_out_difference": _relative(
            [v.loss for v in found.alone.validations], [v.loss for v in found.ours.validations]
        ),
        "speedup": speedup,
        "ceiling": ceiling,
        "ceiling_ideal": float(ranks),
        "of_ceiling": speedup / ceiling,
        "warmup_steps": WARMUP_STEPS,
    }


def loss_difference(reference: Outcome, other: Outcome) -> float:
    """The largest relative difference of two runs' losses at equal steps."""
    mine = {step.step: step.loss for step in reference.steps}
    pairs = [(mine[step.step], step.loss) for step in other.steps if step.step in mine]
    return _relative([a for a, _ in pairs], [b for _, b in pairs])


def _relative(reference: Sequence[float], other: Sequence[float]) -> float:
    pairs = zip(reference, other, strict=False)
    return max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)
