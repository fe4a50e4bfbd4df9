"""A training run on ranks: what every rank is given, does and brings back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

import stretto
from stretto.errors import ConfigError, MeshTimeout, PlanMismatch, RankLost, RanksDisagree
from stretto.mesh.engine import torch_mesh
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import Tell
from stretto.mesh.mesh import Mesh
from stretto.plan.checks import check_trains, is_whole
from stretto.plan.model import Plan
from stretto.train import checkpoint, metrics, shards
from stretto.train.events import Event, Saved, Stepped, Validated, line
from stretto.train.loop import Intervals, Trainer, train
from stretto.train.presets import task_of
from stretto.train.recipe import Recipe
from stretto.train.tasks import Task

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
#: Steps at the start whose times do not count: allocators and thread pools fill there.
WARMUP_STEPS = 2
#: Side of the matrices, and seconds, that the rate of a device is measured with.
_PEAK_SIDE = {"cpu": 768, "cuda": 8192}
_PEAK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run. `out`: folder for metrics and checkpoints, None for neither.

    `validate`, `save`: every how many steps, 0 for at the end only. `resume`: continue after the
    newest complete checkpoint in `out`, if there is one; without it `out` may hold no checkpoint,
    and metrics that it holds are set aside. `until`: stop after that step, as if
    interrupted. `timeout_s`: seconds that a wait for a peer may last.
    Raises PlanMismatch, ConfigError.
    """

    recipe: Recipe
    plan: Plan
    out: str | None = None
    validate: int = 0
    save: int = 0
    resume: bool = False
    until: int | None = None
    device: str | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        check_plan(self.plan)
        check_device(self.device)
        if not isinstance(self.recipe, Recipe):
            raise ConfigError(
                f"recipe={self.recipe!r} is a {type(self.recipe).__name__}, no Recipe"
            )
        for name, least in (("validate", 0), ("save", 0), ("until", 1)):
            value = getattr(self, name)
            if not (name == "until" and value is None) and not (is_whole(value) and value >= least):
                raise ConfigError(f"{name}={value!r}: a number of steps, at least {least}")


def check_plan(plan: Plan) -> None:
    """Raise PlanMismatch where a plan asks for copies of the weights or for repeated work.

    For what is no Plan too.
    """
    if not isinstance(plan, Plan):
        raise PlanMismatch(
            f"plan={plan!r} is a {type(plan).__name__}, no Plan\n"
            "  to fix: Plan(kind='train', dp=..., cp=...)"
        )
    check_trains(plan)
    data, world = plan.dp, plan.world_size
    if data.replicate > 1:
        raise PlanMismatch(
            f"dp: replicate {data.replicate} x shard {data.shard} asks for {data.replicate} copies "
            f"of the weights\n"
            f"  why: the trainer spreads weights over all {world} ranks, one copy in all\n"
            f"  to fix: dp: {{shard: {data.degree}}}, the same ranks, samples and gradients"
        )


def check_unused(out: str | os.PathLike[str] | None) -> None:
    """Raise ConfigError for a folder in which another run would mix its checkpoints with these.

    The newest of both is what a later resume would take, whichever run it is of.
    """
    if out is not None and any((Path(out) / CHECKPOINTS).glob("step-*")):
        raise ConfigError(
            f"{out} holds checkpoints of an earlier run\n"
            "  why: a run that begins anew would leave its own among them\n"
            "  to fix: resume (--resume, Job(resume=True)) to go on from the newest, or another "
            "folder"
        )


def check_device(name: str | None) -> None:
    """Raise ConfigError for a device that no rank trains on.

    Whether this machine has it is asked by a rank's `init_mesh`: that may start CUDA in the
    process.
    """
    if name is None:
        return
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in _PEAK_SIDE:
        raise ConfigError(
            f"device {name!r}: ranks train on cpu or cuda\n"
            "  to fix: --device cpu or cuda, or leave it out: a GPU per rank where there is one"
        )


@dataclass(slots=True)
class Outcome:
    """What a rank brings back. `peak`: measured FLOP/s of a matrix product in the run's dtype."""

    rank: int
    device: str
    parameters: int
    note: str
    peak: float
    steps: list[Stepped] = field(default_factory=list)
    validations: list[Validated] = field(default_factory=list)
    saved: str | None = None

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        timed = self.steps[WARMUP_STEPS:] or self.steps
        return statistics.median(step.seconds for step in timed) if timed else float("nan")

    @property
    def tokens_per_second(self) -> float:
        return self.steps[-1].tokens / self.seconds if self.steps else float("nan")

    def mfu(self, ranks: int) -> float:
        """Model FLOPs per second over what the devices reach in matrix products."""
        if not self.steps:
            return float("nan")
        flops = statistics.median(step.flops for step in self.steps)
        return flops / self.seconds / (ranks * self.peak)


def run(tell: Tell, job: Job) -> Outcome:
    """Body of a rank: build, resume, train. Raises RankLost naming the last checkpoint."""
    return on_mesh(job, lambda mesh: Rank(tell, job, mesh).run())


def on_mesh(job: Job, work: Callable[[Mesh], Outcome]) -> Outcome:
    """What `work` makes of the job's mesh, its errors told to the peers and theirs completed."""
    started_alone = job.plan.world_size == 1 and "RANK" not in os.environ
    with own_group(job) if started_alone else contextlib.nullcontext():
        mesh = init_mesh(job.plan, device=job.device, timeout_s=job.timeout_s)
        try:
            with _peers(mesh, job):
                return work(mesh)
        finally:
            mesh.close()


class Rank:
    """One rank of a job."""

    def __init__(self, tell: Tell, job: Job, mesh: Mesh):
        self.tell = tell
        self.job = job
        self.mesh = mesh
        self.folder = Path(job.out) / CHECKPOINTS if job.out else None

    def run(self) -> Outcome:
        if not self.job.resume:
            check_unused(self.job.out)
        self.tell("reading data")
        task = task_of(self.job.recipe)
        _same_data(task, self.mesh)
        for remark in task.remarks if self.mesh.world_rank == 0 else ():
            log.warning(remark)
        self.tell("building the model")
        model = task.model()
        with attention_bound(model, self.job.plan, self.mesh, alone=task.binds_alone):
            trainer = build(task, model, self.job, self.mesh)
            note, done = self._resume(trainer)
            outcome = self._outcome(trainer, note)
            for event in self._events(trainer, note):
                self._note(event, outcome, done)
                if self.job.until is not None and trainer.done >= self.job.until:
                    break
            return outcome

    def _events(self, trainer: Trainer, note: str) -> Iterator[Event]:
        intervals = Intervals(self.job.validate, self.job.save, self.folder)
        return train(trainer, intervals, self._state(trainer), note)

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint says of its run, beside its step."""
        return {
            "recipe": self.job.recipe.as_dict(),
            "plan": self.job.plan.model_dump(mode="json"),
            "ranks": self.mesh.world_size,
            "data": trainer.task.digest,
            "versions": {"stretto": stretto.__version__, "torch": torch.__version__},
        }

    def _resume(self, trainer: Trainer) -> tuple[str, int]:
        """Continue from the newest checkpoint; the note on it and its step."""
        found = self._newest() if self.job.resume else None
        if found is None:
            if self.job.resume and self.mesh.world_rank == 0:
                log.warning("no checkpoint in %s to resume: begun at step 1", self.folder)
            return "", 0
        state = self._state(trainer)
        check_cursor(found, state)
        check_ahead(found, self.job.recipe.steps)
        trainer.restore(found)
        note = resume_note(found, state)
        if self.mesh.world_rank == 0:
            log.info(note)
        return note, found.step

    def _newest(self) -> checkpoint.Checkpoint | None:
        """Rank 0 looks, so that all ranks take the same one."""
        found = None
        if self.folder is not None and self.mesh.world_rank == 0:
            found = checkpoint.newest(self.folder)
        told = self.mesh.broadcast_bytes(str(found.path).encode() if found else b"").decode()
        return checkpoint.opened(Path(told)) if told else None

    def _outcome(self, trainer: Trainer, note: str) -> Outcome:
        name = str(self.mesh.device)
        if self.mesh.device.type == "cuda":
            name = torch.cuda.get_device_name(self.mesh.device)
        peak = matmul_rate(self.mesh.device, self.job.recipe.dtype)
        return Outcome(self.mesh.world_rank, name, trainer.parameters, note, peak)

    def _note(self, event: Event, outcome: Outcome, resumed: int) -> None:
        """Keep, write down and tell an event."""
        self.mesh.record(f"after {line(event)['event']}, step {event.step}")
        if isinstance(event, Stepped):
            outcome.steps.append(event)
        elif isinstance(event, Validated):
            outcome.validations.append(event)
        elif isinstance(event, Saved):
            outcome.saved = event.path
        if self.mesh.world_rank == 0 and self.job.out:
            metrics.write(Path(self.job.out) / metrics.FILE, event, resumed)
        more = {"loss": event.loss} if isinstance(event, Stepped) else {}
        self.tell("training", done=event.step, total=self.job.recipe.steps, **more)


def build(
    task: Task, model: nn.Module, job: Job, mesh: Mesh, over: DeviceMesh | None = None
) -> Trainer:
    """The trainer of a job before its first step; the model is sharded and moved, in place.

    `over`: what weights are sharded over, by default all ranks of the mesh.
    """
    recipe = job.recipe
    model.to(shards.STORED[recipe.dtype])
    if shards.sharded(mesh, recipe.dtype):
        shards.shard(model, over or torch_mesh(mesh), recipe.dtype)
    shards.materialise(model, mesh.device, recipe.seed)
    return Trainer(task, recipe, job.plan, model, mesh)


def attention_bound(
    model: nn.Module, plan: Plan, mesh: Mesh, *, alone: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """Inside, attention works on this rank's rows of a sequence.

    On one rank there is nothing to bind, unless the task needs that (`alone`).

    Before sharding, because what checks a model of transformers runs it.
    """
    if plan.cp.degree == 1 and not alone:
        return contextlib.nullcontext()
    from stretto.parallel.api import parallelize

    return parallelize(model, plan.cp, mesh=mesh)


def check_cursor(found: checkpoint.Checkpoint, state: dict[str, Any]) -> None:
    """Raise ConfigError where a step number would mean other data than when it was saved."""
    was, now = found.state, state
    names, recipe = ("model", "tokens", "sequences", "seed", "data"), was.get("recipe", {})
    pairs = {name: (recipe.get(name), now["recipe"][name]) for name in names}
    pairs["files"] = (was.get("data"), now["data"])
    differing = [f"{name} {a!r} there, {b!r} here" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ConfigError(
            f"{found.path} belongs to another run: {'; '.join(differing)}\n"
            "  why: its step number says which samples were seen\n"
            "  to fix: give these as they were, or another --out"
        )


def check_ahead(found: checkpoint.Checkpoint, steps: int) -> None:
    """Raise ConfigError where more steps are done than the recipe has in all."""
    if found.step > steps:
        raise ConfigError(
            f"{found.path} has done {found.step} steps, and the recipe has {steps} in all\n"
            "  why: --steps counts from the first step, not from where a run goes on\n"
            f"  to fix: --steps {found.step + steps} for {steps} more, or another --out"
        )


def resume_note(found: checkpoint.Checkpoint, state: dict[str, Any]) -> str:
    """One line on how this run continues the one that saved."""
    parts, now = [f"resumed after step {found.step} of {found.path}"], json.loads(json.dumps(state))
    changed = [name for name in ("plan", "ranks", "versions") if found.state.get(name) != now[name]]
    if changed:
        parts.append(f"not bitwise: {', '.join(changed)} changed, so sums have another order")
    was, recipe = _flat(found.state["recipe"]), _flat(now["recipe"])
    # What an older release did not know of stood at None.
    pairs = {name: (was.get(name), value) for name, value in recipe.items()}
    asked = [f"{name} {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
    if asked:
        parts.append(f"not bitwise: recipe changed ({', '.join(asked)})")
    return "; ".join(parts)


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    inner = recipe.get("descent", {})
    return {key: value for key, value in recipe.items() if key != "descent"} | inner


def _same_data(task: Task, mesh: Mesh) -> None:
    """Raise RanksDisagree unless all ranks see the same data."""
    digests = [part.decode() for part in mesh.gather_bytes(task.digest.encode())]
    if len(set(digests)) > 1:
        raise RanksDisagree(
            f"ranks see different data: {dict(enumerate(digests))}\n"
            "  why: every rank cuts its own part out of the same samples\n"
            "  to fix: the same files, of the same sizes, on every machine"
        )


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s that this device reaches, on this rank's threads, in a square matrix product."""
    side = _PEAK_SIDE[device.type]
    # Of random numbers: products of equal ones take less power, and a GPU then runs faster. From a
    # generator of their own: the default one is as a checkpoint left it.
    own = torch.Generator(device).manual_seed(0)
    x = torch.randn(side, side, device=device, dtype=getattr(torch, dtype), generator=own)
    best, until = float("inf"), 0.0
    # The first one loads the library.
    while not until or time.perf_counter() < until:
        began = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        until = until or time.perf_counter() + _PEAK_S
    return 2 * side**3 / best


@contextlib.contextmanager
def _peers(mesh: Mesh, job: Job) -> Iterator[None]:
    """An error here ends the peers' waits; one that a peer caused says where to go on from."""
    if mesh.world_size == 1:
        yield
        return
    try:
        with mesh.ending_peers("training"):
            yield
    except MeshTimeout as error:
        raise type(error)(f"{error}\n  {_way_on(job)}") from None
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, stretto.errors.StrettoError) or not _of_a_peer(error):
            raise
        cause = str(error).strip().splitlines()[0][:200]
        raise RankLost(
            f"rank {mesh.world_rank}: a peer stopped during a gather or sum of weights ({cause})"
            f"\n  {_way_on(job)}"
        ) from None


def _of_a_peer(error: BaseException) -> bool:
    """Whether torch's own collectives say that another rank is gone or silent."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _way_on(job: Job) -> str:
    found = checkpoint.newest(Path(job.out) / CHECKPOINTS, warn=False) if job.out else None
    if found is None:
        return "there is no checkpoint yet: start again, with --save-every for the next time"
    return f"last checkpoint: {found.path}; continue from it with --resume"


@contextlib.contextmanager
def own_group(job: Job) -> Iterator[None]:
    """A default group of this process alone, where shards need one and there is none."""
    if job.recipe.dtype != "bfloat16" or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
