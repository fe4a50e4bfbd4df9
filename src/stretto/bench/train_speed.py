"""Two ranks beside one at equal tokens, interleaved step by step, with what bounds the speed-up."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from stretto.bench.result import spread
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import OnNote, Tell, launch
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import Mesh
from stretto.plan.model import Plan
from stretto.plan.options import Context
from stretto.train.choice import best_context
from stretto.train.compare import PRELOAD
from stretto.train.job import Job, attention_bound, build
from stretto.train.loop import Trainer
from stretto.train.presets import task_of
from stretto.train.recipe import Recipe

RANKS = 2
#: A rank that waits while the other computes is no stall.
_IDLE_S = 3600.0
_ONE = Plan(kind="train")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train. `plan` None: one rank; `together`: on both processes, each for itself."""

    who: str
    plan: Plan | None = None
    together: bool = False
    threads: int = 1


@dataclass(slots=True)
class Lap:
    """One process's steps by a method: seconds passed, and seconds its processor worked."""

    seconds: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def methods(recipe: Recipe) -> list[Method]:
    """One rank; two by data, by ring, by what auto chooses; what bounds them."""
    context, origin = best_context(recipe, RANKS, 1)
    return [
        Method("1 rank"),
        Method("2 ranks, fsdp", Plan(kind="train", dp=RANKS)),
        Method("2 ranks, ring", Plan(kind="train", cp=Context.named("ring", RANKS))),
        Method("2 ranks, auto", Plan(kind="train", cp=context, origin=origin)),
        Method("independent runs", together=True),
        Method("1 rank, 2 threads", threads=RANKS),
    ]


def rows(recipe: Recipe, rounds: int, on_note: OnNote | None) -> list[dict[str, Any]]:
    """One row per method; a round steps every method once, so a busy moment hits all alike."""
    found = launch(
        on_rank, recipe, rounds, ranks=RANKS, timeout_s=_IDLE_S, preload=PRELOAD, on_note=on_note
    )
    chosen = methods(recipe)
    alone = found[0][0]
    return [
        _row(method, recipe, [rank[index] for rank in found], alone)
        for index, method in enumerate(chosen)
    ]


def _row(method: Method, recipe: Recipe, laps: Sequence[Lap], alone: Lap) -> dict[str, Any]:
    active = [lap for lap in laps if lap.seconds]
    # A step is done when its last rank is.
    seconds = [max(each) for each in zip(*(lap.seconds for lap in active), strict=True)]
    pairs = [one / ours for one, ours in zip(alone.seconds, seconds, strict=True)]
    median = statistics.median(seconds)
    tokens = recipe.tokens * recipe.sequences
    differing = zip(alone.losses, active[0].losses, strict=True)
    return {
        "part": "speed",
        "who": method.who,
        "plan": repr(method.plan or _ONE),
        "ranks": len(active),
        "threads": method.threads,
        "tokens": tokens,
        "seconds": seconds,
        "median_s": median,
        "tokens_per_second": tokens / median,
        "busy": max(statistics.median(lap.busy_s) for lap in active) / median,
        "speedup": statistics.median(alone.seconds) / median,
        "speedup_pairs": spread(pairs),
        "loss_difference": max(abs(a - b) / a for a, b in differing),
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speed-ups of two ranks at equal tokens, and what this machine leaves two processes."""
    by = {row["who"]: row for row in found}
    together = 2 * by["independent runs"]["speedup"]
    best = max((row for row in found if row["who"].startswith("2 ranks")), key=_speedup)
    return {
        "speedup_2ranks": best["speedup"],
        "speedup_2ranks_by": best["who"],
        "speedup_2ranks_fsdp": by["2 ranks, fsdp"]["speedup"],
        "speedup_2ranks_ring": by["2 ranks, ring"]["speedup"],
        "speedup_2ranks_auto": by["2 ranks, auto"]["speedup"],
        "ceiling_2ranks": together,
        "ceiling_ideal_2ranks": 2.0,
        "of_ceiling": best["speedup"] / together,
        "speedup_2threads": by["1 rank, 2 threads"]["speedup"],
        "faster_than_one": best["speedup"] > 1,
    }


def _speedup(row: dict[str, Any]) -> float:
    return row["speedup"]


# ---- on the ranks ------------------------------------------------------------------------------


def on_rank(tell: Tell, recipe: Recipe, rounds: int) -> list[Lap]:
    """Every process builds every method's trainer, then all are stepped in turn."""
    chosen = methods(recipe)
    laps = [Lap() for _ in chosen]
    idle = init_mesh(Plan(kind="train", dp=RANKS), device="cpu", timeout_s=_IDLE_S)
    with ExitStack() as stack:
        steppers = [_stepper(method, recipe, stack) for method in chosen]
        for turn in range(rounds + 1):
            for method, step, lap in zip(chosen, steppers, laps, strict=True):
                tell(method.who, done=turn, total=rounds + 1)
                idle.barrier()
                # The first round warms up.
                _timed(method, step, lap if turn else Lap())
                idle.barrier()
    idle.close()
    return laps


def _stepper(method: Method, recipe: Recipe, stack: ExitStack) -> Callable[[], float] | None:
    """A function that makes one step and returns its loss; None where this rank stands aside."""
    if method.plan is None:
        if not method.together and int(os.environ["RANK"]):
            return None
        mesh: Mesh = LocalWorld(_ONE.sizes).mesh(0)
    else:
        mesh = init_mesh(method.plan, device="cpu", timeout_s=_IDLE_S)
        stack.callback(mesh.close)
    trainer = _trainer(recipe, method.plan or _ONE, mesh, stack)
    return lambda: trainer.step().loss


def _trainer(recipe: Recipe, plan: Plan, mesh: Mesh, stack: ExitStack) -> Trainer:
    task = task_of(recipe)
    model = task.model()
    stack.enter_context(attention_bound(model, plan, mesh))
    return build(task, model, Job(recipe=recipe, plan=plan), mesh)


def _timed(method: Method, step: Callable[[], float] | None, lap: Lap) -> None:
    if step is None:
        return
    torch.set_num_threads(method.threads)
    began, worked = time.perf_counter(), time.process_time()
    lap.losses.append(step())
    lap.seconds.append(time.perf_counter() - began)
    lap.busy_s.append(time.process_time() - worked)
    torch.set_num_threads(1)
