"""Training runs that `bench train` compares: plans on the same processes, and a lost rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stretto.errors import RankLost
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import OnNote, Tell, launch
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Context
from stretto.train.choice import best_context
from stretto.train.compare import PRELOAD, loss_difference, start
from stretto.train.events import Event, Stepped
from stretto.train.job import Job, Outcome, Rank, on_mesh
from stretto.train.recipe import Descent, Recipe

#: Seconds after which ranks that say nothing are given up: far above a step on a busy machine.
TIMEOUT_S = 240.0
#: Allowed relative difference of losses in float64.
TOLERANCE = 1e-9
_ONE = Plan(kind="train")


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe under a plan; `who` names the plan."""

    who: str
    recipe: Recipe
    plan: Plan


def cases(steps: int, ranks: Sequence[int]) -> list[Case]:
    """GPT and DiT under ring, startrail(2) where it exists, and auto, with both optimizers.

    Lengths that no number of ranks divides, and float64, so that only the order of sums differs.
    """
    sgd, adamw = Descent(optimizer="sgd", rate=0.1, warmup=2), Descent(warmup=2)
    text = Recipe(tokens=259, sequences=4, steps=steps, dtype="float64")
    found = []
    for recipe in (
        replace(text, descent=adamw),
        replace(text, descent=sgd),
        replace(text, model="dit-tiny", tokens=225, descent=adamw),
    ):
        found += [Case("one rank", recipe, _ONE)] if 1 in ranks else []
        for count in (count for count in ranks if count > 1):
            found += [Case(who, recipe, plan) for who, plan in _plans(recipe, count)]
    return found


def _plans(recipe: Recipe, ranks: int) -> list[tuple[str, Plan]]:
    names = ["ring"] + ["startrail(2)"] * (ranks % 4 == 0)
    plans = [(name, Plan(kind="train", cp=Context.named(name, ranks))) for name in names]
    context, origin = best_context(recipe, ranks, 1)
    plans.append(("auto", Plan(kind="train", cp=context, origin=origin)))
    if ranks % 4 == 0:
        half = Context.named("ring", ranks // 2)
        plans.append(("fsdp2 x ring", Plan(kind="train", dp=2, cp=half)))
    return plans


def exact_rows(found: Sequence[Case], on_note: OnNote | None) -> list[dict[str, Any]]:
    """Losses of every case beside one rank's, one launch per number of ranks."""
    outcomes: dict[int, Outcome] = {}
    for ranks in sorted({case.plan.world_size for case in found}):
        mine = [i for i, case in enumerate(found) if case.plan.world_size == ranks]
        jobs = [Job(recipe=found[i].recipe, plan=found[i].plan) for i in mine]
        results = launch(
            run_all,
            jobs,
            ranks=ranks,
            timeout_s=TIMEOUT_S,
            preload=PRELOAD,
            on_note=on_note,
        )
        outcomes |= dict(zip(mine, results[0], strict=True))
    alone = {c.recipe: outcomes[i] for i, c in enumerate(found) if c.plan.world_size == 1}
    return [_exact_row(c, outcomes[i], alone[c.recipe]) for i, c in enumerate(found)]


def _exact_row(case: Case, outcome: Outcome, alone: Outcome) -> dict[str, Any]:
    difference = loss_difference(alone, outcome)
    norms = zip(alone.steps, outcome.steps, strict=True)
    return {
        "part": "losses",
        "who": case.who,
        "model": case.recipe.model,
        "optimizer": case.recipe.descent.optimizer,
        "ranks": case.plan.world_size,
        "plan": repr(case.plan),
        "steps": len(outcome.steps),
        "tokens": case.recipe.tokens,
        "loss": outcome.steps[-1].loss,
        "loss_difference": difference,
        "norm_difference": max(abs(b.norm - a.norm) / a.norm for a, b in norms),
        "within_tolerance": difference <= TOLERANCE,
    }


def run_all(tell: Tell, jobs: Sequence[Job]) -> list[Outcome]:
    """Body of a rank: one job after the other on the same processes."""
    outcomes = []
    for number, job in enumerate(jobs):
        tell(f"{job.plan!r}", done=number, total=len(jobs))
        if job.plan.world_size == 1:
            mesh = LocalWorld(job.plan.sizes).mesh(0)
        else:
            mesh = init_mesh(job.plan, device="cpu", timeout_s=TIMEOUT_S)
        try:
            outcomes.append(Rank(tell, job, mesh).run())
        finally:
            mesh.close()
    return outcomes


# ---- a rank that is lost -----------------------------------------------------------------------


def lost_rank(folder: Path, steps: int, on_note: OnNote | None) -> dict[str, Any]:
    """Kill rank 1 between two checkpoints, resume, and compare with a run that nobody disturbed."""
    recipe = Recipe(tokens=259, sequences=4, steps=steps, descent=Descent(warmup=2))
    plan = Plan(kind="train", cp=Context.named("ring", 2))
    job = Job(recipe=recipe, plan=plan, out=str(folder), save=2, timeout_s=TIMEOUT_S)
    whole = start(replace(job, out=None), on_note=on_note)[0]
    error, seconds = _killed(job, after=3, on_note=on_note)
    resumed = start(replace(job, resume=True), on_note=on_note)[0]
    tail = [step.loss for step in whole.steps if step.step > resumed.steps[0].step - 1]
    return {
        "part": "lost rank",
        "who": "kill -9 of rank 1 after step 3",
        "plan": repr(plan),
        "error": error,
        "named": "rank 1" in error and "step-00000002" in error,
        "seconds_to_error": seconds,
        "timeout_s": TIMEOUT_S,
        "resumed_after": resumed.steps[0].step - 1,
        "bitwise": [step.loss for step in resumed.steps] == tail,
        "note": resumed.note,
    }


def _killed(job: Job, *, after: int, on_note: OnNote | None) -> tuple[str, float]:
    """The error of a job whose rank 1 dies after a step, and seconds from its death."""
    mark = Path(job.out or "") / "died"
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        launch(
            run_doomed,
            job,
            after,
            str(mark),
            ranks=job.plan.world_size,
            timeout_s=job.timeout_s,
            preload=PRELOAD,
            on_note=on_note,
        )
    except RankLost as error:
        return str(error), time.time() - float(mark.read_text())
    raise AssertionError("rank 1 is dead and nobody noticed")


def run_doomed(tell: Tell, job: Job, after: int, mark: str) -> Outcome:
    """Body of a rank: train, and on rank 1 be killed after a step."""
    return on_mesh(job, lambda mesh: _Doomed(tell, job, mesh, after, mark).run())


class _Doomed(Rank):
    """A rank whose process is killed; the system does it, so nothing can be tidied up."""

    def __init__(self, tell: Tell, job: Job, mesh: Any, after: int, mark: str):
        super().__init__(tell, job, mesh)
        self._after = after
        self._mark = mark

    def _note(self, event: Event, outcome: Outcome, resumed: int) -> None:
        super()._note(event, outcome, resumed)
        last = isinstance(event, Stepped) and event.step == self._after
        if last and self.mesh.world_rank == 1:
            Path(self._mark).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
