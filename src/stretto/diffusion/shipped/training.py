"""One training: its steps, the running average of its weights, its rate, its loss.

One seed gives one result on one machine: every random number comes from a generator of that seed.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stretto.diffusion.shipped import data
from stretto.diffusion.shipped.losses import Denoiser, loss_of
from stretto.diffusion.shipped.pipeline import ClassPipeline
from stretto.diffusion.shipped.recipe import Recipe, build
from stretto.errors import ConfigError

log = logging.getLogger(__name__)

EMA_DECAY = 0.999
WARM_UP = 500  # Steps; a tenth of a run shorter than 5000.
JUDGED = 200  # Steps that set the length of a run with a time limit; inside its warm-up.


def train(
    recipe: Recipe, pictures: data.Pictures, device: torch.device, seconds: float | None = None
) -> tuple[ClassPipeline, float, Recipe]:
    """Train by recipe; returns the pipeline with averaged weights (float32), loss and recipe.

    The loss is the mean over the last hundredth of the steps. With `seconds` the number of steps
    is what fits into that time, judged by the first ones; the recipe returned names it, and
    repeats the run. Raises ConfigError for counts below 1, an unknown model, sizes that do not fit.
    """
    job = Job(recipe, pictures, device)
    start = half = time.perf_counter()
    advance = job.captured() if recipe.graph else job.advance
    while job.step < job.recipe.steps:
        job.after(advance())
        if seconds and job.step == JUDGED // 2:
            half = _now(device)
        if seconds and job.step == JUDGED:
            end = _now(device)
            pace = (end - half) / (JUDGED - JUDGED // 2)
            job.resize(JUDGED + max(1, int(0.97 * (seconds - end + start) / pace)))
    return with_denoiser(job.pipeline, job.average), job.report.last, job.recipe


def _now(device: torch.device) -> float:
    """The host's clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Job:
    """A training under way: model, average, optimizer, data and the generator of all draws."""

    def __init__(self, recipe: Recipe, pictures: data.Pictures, device: torch.device) -> None:
        self.recipe, self.device, self.step = recipe, device, 0
        self.pipeline = build(recipe, pictures.size)
        self.model = self.pipeline.denoiser.to(device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = _optimizer(self.model, recipe, device)
        self.loss_of = loss_of(self.pipeline, device)
        self.images, self.labels = pictures.images.to(device), pictures.labels.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.forward: Denoiser = torch.compile(self.model) if recipe.compile else self.model
        self.report = Report(recipe.steps)
        self._set_rate()

    def advance(self) -> torch.Tensor:
        """One step of the optimizer; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        x, y = _batch(self.images, self.labels, self.recipe, self.generator)
        with _autocast(self.device):
            loss = self.loss_of(self.forward, x, y, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def captured(self) -> Callable[[], torch.Tensor]:
        """The same step as one CUDA graph: the host launches it whole, not kernel by kernel.

        The steps that warm up and are captured count for nothing: state is put back afterwards.
        """
        if self.device.type != "cuda":
            raise ConfigError("--graph captures CUDA kernels; leave it out on this device")
        before = copy.deepcopy(self.model.state_dict())
        state = self.generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            loss = self.advance()
        self.model.load_state_dict(before)
        for held in self.optimizer.state.values():
            for tensor in held.values():
                tensor.zero_()
        self.generator.set_state(state)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay

    def after(self, loss: torch.Tensor) -> None:
        """Average, count, and set the rate of the next step."""
        _average(self.average, self.model, self.step)
        self.report.add(self.step, loss)
        self.step += 1
        self._set_rate()

    def resize(self, steps: int) -> None:
        """Change the length of the run before its rate begins to fall."""
        self.recipe = replace(self.recipe, steps=steps)
        self.report = Report(steps)
        log.info("the run takes %d steps", steps)

    def _set_rate(self) -> None:
        rate = self.recipe.learning_rate * _factor(self.step, self.recipe.steps)
        for group in self.optimizer.param_groups:
            # A tensor is read by the captured kernels; a number would be frozen into them.
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class Report:
    """Mean loss per hundredth of the run, logged; summed on the device to avoid waiting for it."""

    def __init__(self, steps: int) -> None:
        self.steps, self.every = steps, max(1, steps // 100)
        self.sum: torch.Tensor | float = 0.0
        self.count, self.last, self.start = 0, math.nan, time.perf_counter()

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Count one step's loss, and log at the end of an interval."""
        self.sum, self.count = self.sum + loss, self.count + 1
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        self.last = float(self.sum) / self.count
        self.sum, self.count = 0.0, 0
        seconds = time.perf_counter() - self.start
        log.info("step %d of %d: loss %.5f, %.1f s", step + 1, self.steps, self.last, seconds)


def _batch(
    images: torch.Tensor, labels: torch.Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    device = images.device
    rows = torch.randint(len(images), (recipe.batch,), generator=generator, device=device)
    x = images[rows]
    if recipe.flip:
        flipped = torch.rand(recipe.batch, generator=generator, device=device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    return x, labels[rows]


def _optimizer(
    model: torch.nn.Module, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    rate = recipe.learning_rate
    return torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(rate, device=device) if recipe.graph else rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=device.type == "cuda",
        capturable=recipe.graph,
    )


def _factor(step: int, steps: int) -> float:
    """Learning rate over its peak: a linear warm-up, then half a cosine down to zero."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def _average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the running mean; early on it forgets faster, else it would keep the first weights."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(model.parameters()), None)


def _autocast(device: torch.device) -> AbstractContextManager:
    # Casts kept between steps would be those of the captured weights.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    )


def with_denoiser(pipeline: ClassPipeline, denoiser: torch.nn.Module) -> ClassPipeline:
    """The same pipeline and scheduler around another denoiser."""
    return type(pipeline)(denoiser, pipeline.scheduler)
