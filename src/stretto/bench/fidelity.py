"""How close step parallelism stays to the sequential result, at equal depth and equal ranks.

Virtual ranks (`emulate`: bitwise what ranks compute). Calibrations are made here, on other classes
and seeds than those the comparison is made on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.bench.speed import DATA_RANGE
from stretto.diffusion import quality
from stretto.diffusion.api import emulate
from stretto.diffusion.calibrate import calibrate
from stretto.diffusion.calibration import Calibration
from stretto.diffusion.folder import open_pipeline
from stretto.errors import SplitMismatch
from stretto.mesh.launch import OnNote, Tell, launch
from stretto.plan.model import Plan
from stretto.plan.options import Parastep, Steps, Tail, Windows
from stretto.search.windows import default_depth

MODELS = ("dit", "unet")
#: Classes of calibrations: a top, another, a shoe and a bag, because errors of single pictures
#: differ by 30 dB. The comparison is made on the six others.
CALIBRATED, HELD_OUT = (0, 2, 5, 8), (1, 3, 4, 6, 7, 9)
#: First seeds; each further picture takes the next one.
MEASURED_SEED, CHOSEN_SEED, HELD_OUT_SEED = 100, 200, 1000
_TIMEOUT_S = 1800.0
_PRELOAD = ("stretto.bench.fidelity", "stretto.diffusion.shipped.load")
#: Solvers of second order, as one device may use them in as many steps.
_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`images` held-out pictures; plans are measured, and chosen, on `calibration_images` each."""

    steps: int = 50
    images: int = 12
    calibration_images: int = 4
    degrees: tuple[int, ...] = (4, 8)
    guidance_scale: float = 3.0


def measure(
    setting: Setting, *, ranks: int = 2, on_note: OnNote | None = None
) -> tuple[list[dict], dict[str, float]]:
    """Rows of all models and degrees, shared out over processes; noise floor per model in dB.

    A process has one thread, and a model and degree is measured by one process alone.
    """
    tasks = [(m, p) for m in MODELS for p in sorted(setting.degrees, reverse=True)]
    shared = launch(
        on_rank,
        tasks,
        setting,
        ranks=ranks,
        timeout_s=_TIMEOUT_S,
        preload=_PRELOAD,
        on_note=on_note,
    )
    found = {task: part for parts in shared for task, part in parts.items()}
    rows = [row for task in sorted(found) for row in found[task]]
    floors = {row["model"]: row["psnr_db"] for row in rows if row["who"] == "noise floor"}
    return rows, floors


def on_rank(
    tell: Tell, tasks: Sequence[tuple[str, int]], setting: Setting
) -> dict[tuple[str, int], list[dict]]:
    """This process's share of the tasks."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for model, degree in tasks[rank::ranks]:
        subject = Subject(model, degree, setting, tell)
        found[model, degree] = list(subject.rows())
    return found


class Subject:
    """A shipped model at one degree: its held-out pictures, and what methods make of them."""

    def __init__(self, model: str, degree: int, setting: Setting, tell: Tell):
        self.model = model
        self.degree = degree
        self.setting = setting
        self.depth = default_depth(setting.steps, degree)
        self._pipe = open_pipeline(model)
        self._tell = tell
        self._reference = self._held_out(setting.steps, "sequential")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The methods at this depth, those on one device with as many plain steps, the floor."""
        known = self._calibration()
        entry = known.entry(self.depth)
        plans: tuple[tuple[str, Windows, str], ...] = (
            ("parastep", Parastep(), "damped"),
            ("tail", Tail(), "damped"),
            ("calibrated", known.option(entry), entry.predictor),
        )
        for who, windows, predictor in plans:
            pictures, sizes = self._parallel(who, windows, predictor)
            guesses = "stored" if entry.damping and who == "calibrated" else predictor
            yield self._row(
                who, pictures, windows=sizes, guesses="own" if who == "parastep" else guesses
            )
        yield self._row("fewer steps", self._held_out(self.depth, "fewer steps"))
        for name in _SOLVERS:
            with self._solver(name):
                yield self._row(f"fewer steps, {name}", self._held_out(self.depth, name))
        yield from self._floor()

    def _calibration(self) -> Calibration:
        count, steps = self.setting.calibration_images, self.setting.steps
        labels = [CALIBRATED[index % len(CALIBRATED)] for index in range(count)]
        # Two calls, because the first half leaves few of the plans for the second.
        chosen = [part for part in (labels[::2], labels[1::2]) if part]
        seeds = range(CHOSEN_SEED, HELD_OUT_SEED, count)
        return calibrate(
            self._pipe,
            [self._call(labels, MEASURED_SEED, steps)],
            degree=self.degree,
            depths=[self.depth],
            holdout=[
                self._call(part, seed, steps) for part, seed in zip(chosen, seeds, strict=False)
            ],
            say=lambda stage: self._tell(f"{self.model} p={self.degree}: {stage}"),
        )

    def _parallel(self, who: str, windows: Windows, predictor: str) -> tuple[Tensor, list[int]]:
        steps = Steps(degree=self.degree, windows=windows, predictor=predictor, exact_split=False)
        with emulate(self._pipe, Plan(step=steps)) as run:
            pictures = self._held_out(self.setting.steps, who)
        assert run.report.depth == self.depth, "schedules are compared at one depth"
        return pictures, list(run.report.sizes)

    def _floor(self) -> Iterator[dict[str, Any]]:
        """Sequential with its batch cut in two: what differs is rounding."""
        try:
            with emulate(self._pipe, Plan(cfg=2)):
                pictures = self._held_out(self.setting.steps, "noise floor")
        except SplitMismatch:
            return
        yield self._row("noise floor", pictures) | {"depth": self.setting.steps}

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
        self._tell(f"{self.model} p={self.degree}: {stage}")
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

    def _row(self, who: str, pictures: Tensor, **more: Any) -> dict[str, Any]:
        found = quality.psnr(pictures, self._reference, data_range=DATA_RANGE)
        return {
            "part": "fidelity",
            "model": self.model,
            "degree": self.degree,
            "who": who,
            "steps": self.setting.steps,
            "images": self.setting.images,
            "depth": self.depth,
            "psnr_db": found.average,
            "pooled_db": found.mean,
            "psnr_worst_item_db": found.worst_item,
            "relative_l2": quality.relative_l2(pictures, self._reference),
            **more,
        }
