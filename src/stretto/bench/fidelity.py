"""How close step parallelism stays to the sequential result, at equal depth and equal ranks.

Virtual ranks (`emulate`: bitwise what ranks compute). Calibrations are made here, on other classes
and seeds than those the comparison is made on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.bench.speed import DATA_RANGE
from stretto.diffusion import quality
from stretto.diffusion.api import emulate
from stretto.diffusion.calibrate import calibrations
from stretto.diffusion.calibration import Calibration
from stretto.diffusion.folder import open_pipeline
from stretto.errors import SplitMismatch
from stretto.mesh.launch import OnNote, Tell, launch
from stretto.plan.model import Plan
from stretto.plan.options import Parastep, Steps, Tail, Windows
from stretto.search.windows import default_depth

#: A model and what is measured of it, a method of `Subject`.
Task = tuple[str, str]
#: Processor seconds at the full setting, one thread of a server core (measured, November 2026).
TASKS: dict[Task, float] = {
    ("dit", "calibrated"): 178.0,
    ("dit", "uncalibrated"): 107.0,
    ("unet", "calibrated"): 98.0,
    ("unet", "uncalibrated"): 43.0,
}
#: Classes of calibrations: a top, another, a shoe and a bag, because errors of single pictures
#: differ by 30 dB. The comparison is made on the six others.
CALIBRATED, HELD_OUT = (0, 2, 5, 8), (1, 3, 4, 6, 7, 9)
#: First seeds; each further picture takes the next one.
MEASURED_SEED, CHOSEN_SEED, HELD_OUT_SEED = 100, 200, 1000
_TIMEOUT_S = 1800.0
_PRELOAD = ("stretto.bench.fidelity", "stretto.diffusion.shipped.load")
_ORDER = ("parastep", "tail", "calibrated", "fewer steps", "noise floor")
#: Solvers of second order, as one device may use them in as many steps.
_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")

Row = dict[str, Any]
#: Gets all rows so far whenever there are new ones.
Keep = Callable[[list[Row]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`images` held-out pictures; plans are measured, and chosen, on `calibration_images` each."""

    steps: int = 50
    images: int = 12
    calibration_images: int = 4
    degrees: tuple[int, ...] = (4, 8)
    guidance_scale: float = 3.0


def measure(
    setting: Setting, *, ranks: int = 2, on_note: OnNote | None = None, keep: Keep | None = None
) -> list[Row]:
    """Rows of all models and degrees, shared out over processes of one thread each."""
    so_far: dict[int, list[Row]] = {}

    def follow(rank: int, note: dict[str, Any]) -> None:
        rows = note.get("rows") or []
        if keep and len(rows) > len(so_far.get(rank, [])):
            so_far[rank] = rows
            keep(_sorted(so_far.values()))
        if on_note:
            on_note(rank, note)

    shared = launch(
        on_rank,
        shares(ranks),
        setting,
        ranks=ranks,
        timeout_s=_TIMEOUT_S,
        preload=_PRELOAD,
        on_note=follow,
    )
    return _sorted(shared)


def shares(ranks: int) -> list[list[Task]]:
    """The tasks of each process, the longest first, each to the one that has least to do."""
    found: list[list[Task]] = [[] for _ in range(ranks)]
    for task in sorted(TASKS, key=lambda task: -TASKS[task]):
        min(found, key=lambda tasks: sum(TASKS[each] for each in tasks)).append(task)
    return found


def on_rank(tell: Tell, tasks: Sequence[Sequence[Task]], setting: Setting) -> list[Row]:
    """The rows of this process's share of the tasks; each note carries all rows so far."""
    rows: list[Row] = []

    def say(stage: str) -> None:
        tell(stage, rows=rows)

    for model, part in tasks[int(os.environ.get("RANK", "0"))]:
        subject = Subject(model, setting, say)
        for row in getattr(subject, part)():
            rows.append(row)
            say(f"{model} p={row['degree']}: {row['who']} measured")
    return rows


def _sorted(parts: Iterable[list[Row]]) -> list[Row]:
    def place(row: Row) -> tuple:
        who = row["who"]
        return (row["model"], row["degree"], _ORDER.index(who.split(",")[0]), who)

    return sorted((row for rows in parts for row in rows), key=place)


class Subject:
    """A shipped model: its held-out pictures, and what methods make of them at each degree."""

    def __init__(self, model: str, setting: Setting, say: Callable[[str], None]):
        self.model = model
        self.setting = setting
        self._pipe = open_pipeline(model)
        self._say = say
        self._reference = self._held_out(setting.steps, "sequential")

    def uncalibrated(self) -> Iterator[Row]:
        """The analytic and the published schedule, as many plain steps on one device, the floor."""
        for degree in self._degrees:
            for who, windows in (("parastep", Parastep()), ("tail", Tail())):
                guesses = "own" if who == "parastep" else "damped"
                yield self._parallel(who, degree, windows) | {"guesses": guesses}
        for degree in self._degrees:
            yield from self._fewer_steps(degree)
        yield from self._floor()

    def calibrated(self) -> Iterator[Row]:
        """Windows measured here, on pictures that the comparison does not use."""
        for degree, known in self._calibrations().items():
            entry = known.entry(self._depth(degree))
            row = self._parallel("calibrated", degree, known.option(entry), entry.predictor)
            yield row | {"guesses": "stored" if entry.damping else entry.predictor}

    @property
    def _degrees(self) -> list[int]:
        return sorted(self.setting.degrees, reverse=True)

    def _depth(self, degree: int) -> int:
        return default_depth(self.setting.steps, degree)

    def _calibrations(self) -> dict[int, Calibration]:
        count, steps = self.setting.calibration_images, self.setting.steps
        labels = [CALIBRATED[index % len(CALIBRATED)] for index in range(count)]
        # Two calls, because the first half leaves few of the plans for the second.
        chosen = [part for part in (labels[::2], labels[1::2]) if part]
        seeds = range(CHOSEN_SEED, HELD_OUT_SEED, count)
        return calibrations(
            self._pipe,
            [self._call(labels, MEASURED_SEED, steps)],
            depths={degree: [self._depth(degree)] for degree in self._degrees},
            holdout=[
                self._call(part, seed, steps) for part, seed in zip(chosen, seeds, strict=False)
            ],
            say=lambda stage: self._say(f"{self.model}: {stage}"),
        )

    def _parallel(self, who: str, degree: int, windows: Windows, predictor: str = "damped") -> Row:
        steps = Steps(degree=degree, windows=windows, predictor=predictor, exact_split=False)
        with emulate(self._pipe, Plan(step=steps), reuse=True) as run:
            pictures = self._held_out(self.setting.steps, f"p={degree}: {who}")
        assert run.report is not None, "a picture was generated"
        assert run.report.depth == self._depth(degree), "schedules are compared at one depth"
        return self._row(who, degree, pictures) | {"windows": list(run.report.sizes)}

    def _fewer_steps(self, degree: int) -> Iterator[Row]:
        """One device, as many steps as the ranks take rounds: the same solver, and better ones."""
        who, depth = "fewer steps", self._depth(degree)
        yield self._row(who, degree, self._held_out(depth, f"p={degree}: {who}"))
        for name in _SOLVERS:
            with self._solver(name):
                pictures = self._held_out(depth, f"p={degree}: {name}")
            yield self._row(f"{who}, {name}", degree, pictures)

    def _floor(self) -> Iterator[Row]:
        """Sequential with its batch cut in two: what differs is rounding."""
        try:
            with emulate(self._pipe, Plan(cfg=2)):
                pictures = self._held_out(self.setting.steps, "noise floor")
        except SplitMismatch:
            return
        yield self._row("noise floor", 1, pictures) | {"depth": self.setting.steps}

    @contextmanager
    def _solver(self, name: str) -> Iterator[None]:
        import diffusers

        known = self._pipe.scheduler
        config = dict(known.config)
        if "shift" in config:
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            self._pipe.scheduler = getattr(diffusers, name)(**flow, flow_shift=config["shift"])
        else:
            self._pipe.scheduler = getattr(diffusers, name).from_config(config)
        try:
            yield
        finally:
            self._pipe.scheduler = known

    def _held_out(self, steps: int, stage: str) -> Tensor:
        self._say(f"{self.model} {stage}")
        labels = [HELD_OUT[index % len(HELD_OUT)] for index in range(self.setting.images)]
        return self._pipe(**self._call(labels, HELD_OUT_SEED, steps)).images

    def _call(self, labels: list[int], seed: int, steps: int) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(labels))]
        return {
            "class_labels": labels,
            "num_inference_steps": steps,
            "guidance_scale": self.setting.guidance_scale,
            "generator": generators,
            "output_type": "latent",
        }

    def _row(self, who: str, degree: int, pictures: Tensor) -> Row:
        found = quality.psnr(pictures, self._reference, data_range=DATA_RANGE)
        return {
            "part": "fidelity",
            "model": self.model,
            "degree": degree,
            "who": who,
            "steps": self.setting.steps,
            "images": self.setting.images,
            "depth": self._depth(degree),
            "psnr_db": found.average,
            "pooled_db": found.mean,
            "psnr_worst_item_db": found.worst_item,
            "relative_l2": quality.relative_l2(pictures, self._reference),
        }
