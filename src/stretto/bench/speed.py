"""How much faster two ranks are than one: methods that take turns in one job, warm, interleaved.

Each rank has one thread. A method of one rank runs while the other sleeps in a barrier. Beside the
methods stand what two threads of one process reach, and what the machine itself gives two ranks
that have nothing to do with each other (the speed that shared memory leaves them).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stretto.bench.result import spread
from stretto.diffusion import quality
from stretto.diffusion.api import parallelized
from stretto.diffusion.clock import Clock
from stretto.diffusion.compare import Costs, depth_of
from stretto.diffusion.folder import open_pipeline
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import OnNote, Tell, launch
from stretto.mesh.mesh import Mesh
from stretto.plan.model import Plan
from stretto.plan.options import Parastep, Steps

RANKS = 2
#: Pictures lie in [-1, 1].
DATA_RANGE = 2.0
#: A rank that sleeps while another computes is no stall; the launcher watches that one.
_IDLE_S = 24 * 3600.0
_TIMEOUT_S = 300.0
_PRELOAD = ("stretto.bench.speed", "stretto.diffusion.shipped.load")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to generate. `plan` None is the untouched pipeline: on rank 0, or `together` on both.

    `guided`: with classifier-free guidance, which doubles the denoiser's batch.
    """

    who: str
    guided: bool
    plan: Plan | None = None
    together: bool = False
    threads: int = 1


#: Without guidance an exact step stays whole: cutting a batch of pictures is data parallelism.
_STEP_ALONE = Plan(step=Steps(degree=RANKS, exact_split=False))
METHODS = (
    Method(who="sequential", guided=True),
    Method(who="cfg2", guided=True, plan=Plan(cfg=RANKS)),
    Method(who="step2 tail", guided=True, plan=Plan(step=RANKS)),
    Method(
        who="parastep p=2",
        guided=True,
        plan=Plan(step=Steps(degree=RANKS, windows=Parastep())),
    ),
    Method(who="independent runs", guided=True, together=True),
    Method(who="sequential, 2 threads", guided=True, threads=RANKS),
    Method(who="sequential", guided=False),
    Method(who="step2 tail", guided=False, plan=_STEP_ALONE),
    Method(who="independent runs", guided=False, together=True),
    Method(who="sequential, 2 threads", guided=False, threads=RANKS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What every method generates: `images` pictures, twice as many where guidance is off.

    So that the denoiser has the same batch, and with it the same time, in both.
    """

    steps: int
    images: int
    repeats: int
    guidance_scale: float = 3.0


@dataclass(slots=True)
class Lap:
    """What one rank did for one method. `seconds` passed, `denoiser_s` of processor time in it."""

    seconds: list[float] = field(default_factory=list)
    denoiser_s: list[float] = field(default_factory=list)
    calls: int = 0
    report: dict | None = None
    pictures: Tensor | None = None


@dataclass(slots=True)
class Laps:
    """One rank's laps in the order of METHODS, and denoiser seconds of a whole and a half batch."""

    laps: list[Lap]
    whole_s: list[float]
    half_s: list[float]


def measure(race: Race, on_note: OnNote | None = None) -> tuple[list[dict], dict[str, Any]]:
    """Run the race on two ranks started here: rows of the table, and facts about the denoiser."""
    ranks = launch(
        on_rank,
        race,
        ranks=RANKS,
        timeout_s=_TIMEOUT_S,
        preload=_PRELOAD,
        on_note=on_note,
    )
    half = statistics.median(ranks[0].half_s) / statistics.median(ranks[0].whole_s)
    facts = {
        "denoiser_seconds": spread(ranks[0].whole_s),
        "half_batch_cost": half,
    }
    return rows(race, ranks, half), facts


# ---- on the ranks ----------------------------------------------------------------------------


def on_rank(tell: Tell, race: Race) -> Laps:
    """Every rank runs all methods, in the same order, `repeats` times."""
    runner = _Runner(race)
    laps = Laps([Lap() for _ in METHODS], [], [])
    for method in METHODS:
        tell(f"warming up: {method.who}")
        runner.run(method, Lap(), steps=min(race.steps, 4))
    for repeat in range(race.repeats):
        tell("cost of half a batch", done=repeat, total=race.repeats)
        runner.costs(laps)
        for method, lap in zip(METHODS, laps.laps, strict=True):
            tell(method.who, done=repeat, total=race.repeats)
            runner.run(method, lap, steps=race.steps)
    return laps


class _Runner:
    """The pipeline and the meshes of one rank."""

    def __init__(self, race: Race):
        self.race = race
        self.rank = int(os.environ["RANK"])
        self.pipe = open_pipeline("dit")
        self._meshes: dict[tuple, Mesh] = {}
        self._idle = init_mesh(Plan(step=RANKS), device="cpu", timeout_s=_IDLE_S)

    def run(self, method: Method, lap: Lap, *, steps: int) -> None:
        self._idle.barrier()
        if method.plan is not None:
            mesh = self._mesh(method.plan)
            with Clock(self.pipe) as clock, parallelized(self.pipe, method.plan, mesh=mesh) as ours:
                self._timed(method, lap, steps, clock)
            lap.report = ours.report.as_dict() if ours.report else None
        elif method.together or self.rank == 0:
            torch.set_num_threads(method.threads)
            with Clock(self.pipe) as clock:
                self._timed(method, lap, steps, clock)
            torch.set_num_threads(1)
        self._idle.barrier()

    def costs(self, laps: Laps) -> None:
        """Denoiser seconds of the guided batch, and of half of it, on rank 0 alone."""
        self._idle.barrier()
        if self.rank == 0:
            for guided, seconds in ((True, laps.whole_s), (False, laps.half_s)):
                with Clock(self.pipe) as clock:
                    self._generate(self.race.images, guided, steps=3)
                seconds += clock.seconds
        self._idle.barrier()

    def _timed(self, method: Method, lap: Lap, steps: int, clock: Clock) -> None:
        images = self.race.images * (1 if method.guided else 2)
        began = time.perf_counter()
        pictures = self._generate(images, method.guided, steps)
        lap.seconds.append(time.perf_counter() - began)
        lap.denoiser_s.append(sum(clock.seconds))
        lap.calls = len(clock.seconds)
        if self.rank == 0:
            lap.pictures = pictures

    def _generate(self, images: int, guided: bool, steps: int) -> Tensor:
        return self.pipe(
            class_labels=[index % 10 for index in range(images)],
            num_inference_steps=steps,
            guidance_scale=self.race.guidance_scale if guided else 1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    def _mesh(self, plan: Plan) -> Mesh:
        key = tuple(plan.sizes.items())
        if key not in self._meshes:
            self._meshes[key] = init_mesh(plan, device="cpu", timeout_s=_TIMEOUT_S)
        return self._meshes[key]


# ---- the table -------------------------------------------------------------------------------


def rows(race: Race, ranks: Sequence[Laps], half: float) -> list[dict[str, Any]]:
    """One row per method; the sequential method with the same guidance is its reference."""
    found, reference = [], ranks[0].laps[0]
    for index, method in enumerate(METHODS):
        laps = [rank.laps[index] for rank in ranks if rank.laps[index].seconds]
        if method.who == "sequential":
            reference = laps[0]
        found.append(_row(race, method, laps, reference, half))
    return found


def _row(
    race: Race, method: Method, laps: Sequence[Lap], reference: Lap, half: float
) -> dict[str, Any]:
    # A method is done when its last rank is.
    seconds = [max(each) for each in zip(*(lap.seconds for lap in laps), strict=True)]
    pairs = [alone / ours for alone, ours in zip(reference.seconds, seconds, strict=True)]
    row: dict[str, Any] = {
        "part": "speed",
        "who": method.who,
        "guidance": method.guided,
        "plan": repr(method.plan) if method.plan else "untouched pipeline",
        "ranks": len(laps),
        "threads": method.threads,
        "steps": race.steps,
        "images": race.images * (1 if method.guided else 2),
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "speedup": statistics.median(reference.seconds) / statistics.median(seconds),
        "speedup_pairs": spread(pairs),
        "denoiser_s": max(statistics.median(lap.denoiser_s) for lap in laps),
        "evaluations": [lap.calls for lap in laps],
    }
    if method.plan is not None:
        row |= _planned(race, method.plan, laps, half, row["speedup"])
    return row | _distance(laps[0].pictures, reference.pictures)


def _planned(
    race: Race, plan: Plan, laps: Sequence[Lap], half: float, speedup: float
) -> dict[str, Any]:
    reports = [lap.report for lap in laps if lap.report]
    depths = [depth_of(reports[0], plan, _costs(cost)) for cost in (half, 0.5)]
    ceilings = [race.steps / depth for depth in depths]
    return {
        "depth": depths[0],
        "depth_ideal": depths[1],
        "ceiling": ceilings[0],
        "ceiling_ideal": ceilings[1],
        "of_ceiling": speedup / ceilings[0],
        "of_ceiling_ideal": speedup / ceilings[1],
        "windows": [window["size"] for window in reports[0]["windows"]],
        "network_calls": [report["network_calls"] for report in reports],
        "bytes_sent": [report["bytes_sent"] for report in reports],
        "worst_guess": max(window["error"] or 0.0 for window in reports[0]["windows"]),
    }


def _costs(half: float) -> Costs:
    return {(1, 1): 1.0, (2, 1): half, (1, 2): half}


def _distance(pictures: Tensor | None, reference: Tensor | None) -> dict[str, Any]:
    if pictures is None or reference is None:
        return {}
    found = quality.psnr(pictures, reference, data_range=DATA_RANGE)
    return {
        "identical": torch.equal(pictures, reference),
        "psnr_db": found.mean,
        "psnr_worst_item_db": found.worst_item,
        "relative_l2": quality.relative_l2(pictures, reference),
    }
