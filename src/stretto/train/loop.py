"""The training loop: a step is draw, backward, clip, update; around it validation and checkpoints.

Nothing it computes depends on the number of ranks but the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stretto.errors import NonFinite
from stretto.mesh.mesh import Mesh
from stretto.parallel.context import own_rows
from stretto.plan.model import Plan
from stretto.train import checkpoint, shards
from stretto.train.descent import optimizer_of, rate_at, set_rate
from stretto.train.events import Began, Event, Saved, Stepped, Validated
from stretto.train.recipe import Recipe, accumulation
from stretto.train.tasks import Task, to_device

#: Held-out samples of a validation, at most.
VALIDATION_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's parts of one step, the terms of its loss on all ranks, its arithmetic."""

    parts: list[Any]
    terms: int
    flops: float


class Trainer:
    """A sharded model that has done `done` steps of a recipe."""

    def __init__(self, task: Task, recipe: Recipe, plan: Plan, model: nn.Module, mesh: Mesh):
        self.task = task
        self.recipe = recipe
        self.plan = plan
        self.model = model
        self.mesh = mesh
        self.optimizer = optimizer_of(model, recipe.descent)
        self.micro_batch = plan.dp.micro_batch
        self.micro_steps = accumulation(recipe.sequences, mesh.size("fsdp"), self.micro_batch)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.small = shards.is_small(model)
        self.done = 0

    def step(self) -> Stepped:
        """One step of the recipe. Raises NonFinite; RankLost when a peer stops."""
        began = time.perf_counter()
        batch = self.draw()
        loss = self.backward(batch)
        loss, norm = self.clip(loss)
        rate = self.update()
        return self.report(batch, loss, norm, rate, time.perf_counter() - began)

    def draw(self) -> Batch:
        """This data rank's samples, cut to the rows that the attention plan gives this rank."""
        first = self.done * self.recipe.sequences
        numbers = range(self.micro_steps)
        samples = [self._sample(first, number) for number in numbers]
        parts = [self._part(sample) for sample in samples]
        # Each sample is whole on all ranks of its cp group, which would count its FLOPs again.
        flops = sum(self.task.flops(sample) for sample in samples) / self.mesh.size("cp")
        terms, flops = shards.total([sum(map(self.task.count, parts)), flops], self.mesh)
        return Batch(parts, int(terms), flops)

    def backward(self, batch: Batch) -> torch.Tensor:
        """Accumulate gradients of the mean loss; this rank's share of that loss."""
        share = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number, part in enumerate(batch.parts):
            if self.small:
                shards.between(self.model, last=number == len(batch.parts) - 1)
            loss = self.task.loss(self.model, part) / batch.terms
            loss.backward()
            share += loss.detach()
        return share

    def clip(self, share: torch.Tensor) -> tuple[float, float]:
        """Scale all gradients by one factor; the step's loss and the norm that they had."""
        parts = shards.gradients(self.model)
        squares = shards.square_sum(parts)
        loss, squares = shards.total([share, squares], self.mesh)
        norm = squares**0.5
        if not norm < float("inf") or not abs(loss) < float("inf"):
            raise NonFinite(
                f"step {self.done + 1}: loss {loss}, gradient norm {norm}\n"
                "  to fix: a lower rate, a longer warm-up, or float32 where bfloat16 overflows"
            )
        limit = self.recipe.descent.clip
        if limit and norm > limit:
            torch._foreach_mul_(parts, limit / norm)
        return loss, norm

    def update(self) -> float:
        """Move the weights; the learning rate used."""
        rate = rate_at(self.recipe.descent, self.done, self.recipe.steps)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return rate

    def report(
        self, batch: Batch, loss: float, norm: float, rate: float, seconds: float
    ) -> Stepped:
        tokens = self.recipe.sequences * self.task.tokens
        return Stepped(self.done, loss, norm, rate, tokens, seconds, batch.flops)

    def validate(self, samples: int = VALIDATION_SAMPLES) -> Validated:
        """Mean loss over held-out samples, the same ones every time, shared over data ranks."""
        data_ranks, here = self.mesh.size("fsdp"), self.mesh.rank("fsdp")
        total, terms = 0.0, 0
        with torch.no_grad():
            # Every rank runs the model equally often, since running it gathers weights; what is
            # beyond the samples does not count.
            for number in range(here, -(-samples // data_ranks) * data_ranks, data_ranks):
                part = self._part(self.task.sample(number, held_out=True))
                loss = float(self.task.loss(self.model, part))
                if number < samples:
                    total += loss
                    terms += self.task.count(part)
        shards.reshard(self.model)
        total, terms = shards.total([total, terms], self.mesh)
        return Validated(self.done, total / terms)

    def save(self, folder: Path, state: dict[str, Any]) -> Saved:
        """Write a checkpoint of this moment."""
        began = time.perf_counter()
        tensors = checkpoint.tensors_of(self.model, self.optimizer)
        tensors |= checkpoint.random_state(self.mesh)
        path = checkpoint.save(folder, self.done, tensors, state, self.mesh)
        return Saved(self.done, str(path), time.perf_counter() - began)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Continue after a checkpoint, bitwise where ranks, plan and recipe are as they were."""
        saved = checkpoint.saved_keys(found)
        checkpoint.begin_state(self.model, self.optimizer, saved)
        tensors = checkpoint.tensors_of(self.model, self.optimizer)
        own = checkpoint.random_state(self.mesh)
        known = set(own) <= saved
        checkpoint.load(found, {**tensors, **own} if known else tensors, self.mesh)
        if known:
            checkpoint.set_random_state(own, self.mesh)
        self.done = found.step

    def _sample(self, first: int, micro_step: int) -> Any:
        place = micro_step * self.mesh.size("fsdp") + self.mesh.rank("fsdp")
        return self.task.sample(first + place * self.micro_batch, self.micro_batch)

    def _part(self, sample: Any) -> Any:
        return to_device(self.task.cut(sample, self._rows(sample)), self.mesh.device)

    def _rows(self, sample: Any) -> torch.Tensor | None:
        """Rows of a sample that the attention plan gives this rank, None for all."""
        if self.mesh.size("cp") == 1:
            return None
        # As attention settles its layout, which a window must not change.
        mask, length = self.task.mask(sample), self.task.length(sample)
        own = own_rows(length, self.mesh, self.plan.cp, mask)
        spans = [torch.arange(*span) for span in own]
        return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Every how many steps something happens, 0 for at the end only, and where checkpoints go."""

    validate: int = 0
    save: int = 0
    folder: Path | None = None


def train(
    trainer: Trainer, intervals: Intervals, state: dict[str, Any], note: str = ""
) -> Iterator[Event]:
    """The rest of the recipe, event by event; ends after its last step."""
    steps = trainer.recipe.steps
    tokens = trainer.recipe.sequences * trainer.task.tokens
    yield Began(trainer.done, steps, trainer.parameters, tokens, note)
    if trainer.done == 0 and intervals.validate:
        yield trainer.validate()
    while trainer.done < steps:
        yield trainer.step()
        if _due(intervals.validate, trainer.done, steps):
            yield trainer.validate()
        if intervals.folder is not None and _due(intervals.save, trainer.done, steps):
            yield trainer.save(intervals.folder, state)


def _due(interval: int, done: int, steps: int) -> bool:
    return done == steps or (interval > 0 and done % interval == 0)
