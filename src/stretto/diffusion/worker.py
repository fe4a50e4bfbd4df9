"""One rank's pipeline: it generates under any plan, tells how far it is, gives plain results."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stretto.diffusion import adapters
from stretto.diffusion.api import emulate, parallelized
from stretto.diffusion.arguments import naming_arguments
from stretto.diffusion.clock import Count
from stretto.diffusion.job import Job, Run
from stretto.diffusion.output import Media
from stretto.errors import ConfigError, PlanMismatch, UnsupportedPipeline
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import Tell
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import WARMING_UP, Mesh
from stretto.plan.model import Plan
from stretto.plan.options import Steps

#: Names under which pipelines take the strength of classifier-free guidance.
_SCALES = ("guidance_scale", "max_guidance_scale")
#: How pipelines ask themselves whether there are two branches.
_ASKS = re.compile(r"do_classifier_free_guidance|guidance_scale > 1")
#: A rank that idles while another computes alone is no stall; the launcher watches that one.
_IDLE_S = 7 * 24 * 3600.0
_NOTE_EVERY_S = 0.2
_VIDEO_FPS, _AUDIO_HZ = 8, 16000


class Worker:
    """A pipeline on one rank, with the meshes its methods need and a voice to the parent."""

    def __init__(self, pipe: Any, job: Job, plan: Plan, tell: Tell, device: torch.device):
        self.pipe = pipe
        self.job = job
        self.plan = plan
        self.device = device
        self.rank = int(os.environ.get("RANK", "0")) if job.ranks > 1 and not job.emulated else 0
        self._tell = tell
        self._meshes: dict[tuple, Mesh] = {}
        self._call = _checked(pipe, job)
        # Looked at now: under a plan the pipeline has another class.
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        self._can_skip_decoding = '"latent"' in _source_of(type(pipe))
        check_degree(plan, job.steps)

    @property
    def is_alone(self) -> bool:
        """One process: a single rank, or virtual ones."""
        return self.job.ranks == 1 or self.job.emulated

    def run(self, who: str, plan: Plan | None, steps: int, stage: str | None = None) -> Run:
        """Generate once. `plan` None: the untouched pipeline, on rank 0 while the others wait."""
        self.wait_for_all()
        run = Run(who=who, plan=plan, steps=steps)
        if plan is not None or self.rank == 0:
            self._generate(run, stage or who)
        self.wait_for_all()
        return run

    @contextmanager
    def emulated(self, plan: Plan) -> Iterator[Callable[[int], Media]]:
        """On this rank alone, with virtual ranks: a function from steps to what is generated."""

        def once(steps: int) -> Media:
            with self._naming(steps):
                result = self.pipe(**self._arguments(steps))
            return media_of(self.pipe, result, self._call)

        with emulate(self.pipe, plan, denoiser=self.job.denoiser), self._told("measuring"):
            yield once

    def _generate(self, run: Run, stage: str) -> None:
        with self._under(run.plan) as attached, self._told(stage):
            began = time.perf_counter()
            with self._naming(run.steps):
                result = self.pipe(**self._arguments(run.steps))
            self._synchronize()
            run.seconds.append(time.perf_counter() - began)
        if isinstance(attached, Count):
            run.calls = attached.calls
        else:
            run.report = attached.report.as_dict()
            if self.job.emulated:
                run.report["ranks"] = [report.as_dict() for report in attached.reports]
        if self.rank == 0:
            run.media = media_of(self.pipe, result, self._call)

    def wait_for_all(self) -> None:
        """Every rank is here. Waiting ranks sleep in the kernel; they do not spin."""
        if not self.is_alone:
            # Keyed apart: this mesh has no deadline of its own.
            self._mesh(self.plan, _IDLE_S).barrier()

    def _under(self, plan: Plan | None) -> AbstractContextManager:
        if plan is None:
            return Count(self.pipe, self.job.denoiser)
        options = {"denoiser": self.job.denoiser}
        if self.job.emulated:
            return emulate(self.pipe, plan, timeout_s=self.job.timeout_s, **options)
        return parallelized(self.pipe, plan, mesh=self._mesh(plan, self.job.timeout_s), **options)

    def _mesh(self, plan: Plan, timeout_s: float) -> Mesh:
        """The mesh of these degrees; every rank makes the same ones in the same order."""
        key = (tuple(plan.sizes.items()), timeout_s)
        if key not in self._meshes:
            if self.is_alone:
                world = LocalWorld(plan.sizes, device=self.device, timeout_s=timeout_s)
                self._meshes[key] = world.mesh(0)
            else:
                self._meshes[key] = init_mesh(plan, device=self.device, timeout_s=timeout_s)
        return self._meshes[key]

    def _naming(self, steps: int) -> AbstractContextManager:
        given = {**self.job.call, "num_inference_steps": steps}
        return naming_arguments(self.pipe, given)

    def _arguments(self, steps: int) -> dict[str, Any]:
        arguments = {**self._call, "num_inference_steps": steps}
        if "generator" in self._accepted:
            arguments["generator"] = self._generators()
        if "output_type" in self._accepted:
            skips = self.rank > 0 and self._can_skip_decoding
            arguments["output_type"] = "latent" if skips else "np"
        return arguments

    def _generators(self) -> torch.Generator | list[torch.Generator]:
        labels = self._call.get("class_labels")
        if isinstance(labels, list) and len(labels) > 1:
            # An item does not depend on which others were asked for.
            return [self._seeded(self.job.seed + i) for i in range(len(labels))]
        return self._seeded(self.job.seed)

    @staticmethod
    def _seeded(seed: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _told(self, stage: str) -> Iterator[None]:
        """The pipeline's progress goes to the parent: for people, and as a sign of life."""
        # Text encoding and the first window load kernels and compile; then notes come by the step.
        self._tell(stage, patience_s=WARMING_UP * self.job.timeout_s)
        pipe, tell = self.pipe, self._tell

        def progress_bar(iterable: Any = None, total: int | None = None) -> Progress:
            return Progress(tell, stage, iterable, total)

        vars(pipe)["progress_bar"] = progress_bar
        try:
            yield
        finally:
            vars(pipe).pop("progress_bar", None)


class Progress:
    """Stands in for the bar of a pipeline: counts, and tells at most every 0.2 s."""

    def __init__(self, tell: Tell, stage: str, iterable: Any, total: int | None):
        self._tell = tell
        self._stage = stage
        self._items = iterable
        self._total = total if total is not None else len(iterable) if iterable is not None else 0
        self._done = 0
        self._told = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._say()

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()
        self._say()

    def update(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._told > _NOTE_EVERY_S:
            self._say()

    def set_description(self, *args: Any, **kwargs: Any) -> None:
        """Part of what pipelines call; the stage has a name already."""

    set_postfix = set_description

    def _say(self) -> None:
        self._told = time.monotonic()
        self._tell(self._stage, done=self._done, total=self._total)


def guides(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Does this call evaluate a guided and an unguided branch?

    `guidance_scale` alone does not say: distilled models take it as an input. Pipelines with two
    branches ask whether it is above 1, and those that also have a distilled one, whether a
    `true_cfg_scale` is and there is something to guide away from.
    """
    plain = type(pipe)
    parameters = inspect.signature(plain.__call__).parameters

    def exceeds_one(name: str) -> bool:
        scale = call.get(name, parameters[name].default)
        return isinstance(scale, (int, float)) and scale > 1.0

    if "true_cfg_scale" in parameters:
        away = (call.get(name) for name in ("negative_prompt", "negative_prompt_embeds"))
        return exceeds_one("true_cfg_scale") and any(each is not None for each in away)
    is_asked = _ASKS.search(_source_of(plain)) or hasattr(plain, "do_classifier_free_guidance")
    if not is_asked or _embeds_scale(pipe):
        return False
    return next((exceeds_one(name) for name in _SCALES if name in parameters), False)


def _embeds_scale(pipe: Any) -> bool:
    """Whether the denoiser takes the scale as an input, as those distilled for few steps do."""
    config = getattr(getattr(pipe, "unet", None), "config", {})
    return config.get("time_cond_proj_dim") is not None


def media_of(pipe: Any, result: Any, call: Mapping[str, Any]) -> Media:
    """What a pipeline returned, as arrays. Raises UnsupportedPipeline for anything else."""
    for name in ("images", "frames", "audios"):
        value = getattr(result, name, None)
        if value is None:
            continue
        items = _array(value)
        if name == "audios":
            items = items[:, :, None] if items.ndim == 2 else items.swapaxes(1, 2)
            return Media("audio", items, _sampling_rate(pipe))
        if items.ndim == 5:
            return Media("video", items, int(call.get("fps") or _VIDEO_FPS))
        return Media("image", items if items.ndim == 4 else items[..., None])
    raise UnsupportedPipeline(
        f"{type(pipe).__name__} returned {type(result).__name__}, which has neither images, "
        "frames nor audios; use stretto.parallelized in Python"
    )


def _array(value: Any) -> np.ndarray:
    """Tensors, arrays, pictures or nested lists of them as one float32 array."""
    if isinstance(value, torch.Tensor):
        return value.detach().float().cpu().numpy()
    if isinstance(value, np.ndarray):
        return value.astype(np.float32)
    if isinstance(value, (list, tuple)):
        return np.stack([_array(item) for item in value])
    picture = np.asarray(value, dtype=np.float32) / 255
    return picture if picture.ndim == 3 else picture[..., None]


def _sampling_rate(pipe: Any) -> int:
    for part in ("vocoder", "vae"):
        config = getattr(getattr(pipe, part, None), "config", None)
        rate = getattr(config, "sampling_rate", None)
        if rate:
            return int(rate)
    return _AUDIO_HZ


def _checked(pipe: Any, job: Job) -> dict[str, Any]:
    """The call's arguments, files read. Raises ConfigError for one the pipeline does not take."""
    adapters.denoisers_of(pipe, job.denoiser)
    accepted = [n for n in inspect.signature(type(pipe).__call__).parameters if n != "self"]
    if "num_inference_steps" not in accepted:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} takes no num_inference_steps, so it is no pipeline of "
            f"denoising steps; it takes {', '.join(accepted)}"
        )
    for name in job.call:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{type(pipe).__name__} takes no {name!r}{hint}\n  it takes: {', '.join(accepted)}"
            )
    return {name: _read(value) for name, value in job.call.items()}


def _read(value: Any) -> Any:
    """An argument; "@file" is what the file holds, "@@text" the text without its first @."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    file = Path(value[1:])
    if not os.path.isfile(file):  # unlike Path.is_file, False for a name that is too long
        raise ConfigError(f"no file {file}, which --set names with @")
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        from PIL import Image

        return Image.open(file).convert("RGB")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is neither a picture nor a .npy array: {error}") from None


def check_degree(plan: Plan, steps: int) -> None:
    """Raise PlanMismatch for more step ranks than steps."""
    if plan.step.degree > steps:
        raise PlanMismatch(
            f"step={plan.step.degree} is larger than the {steps} steps of this generation\n"
            "  why: each step rank evaluates a step of its own\n"
            f"  to fix: at most step={steps}, or more --steps"
        )


def _source_of(plain: type) -> str:
    """Source of the pipeline's call, inherited parts of the loop included."""
    return "".join(inspect.getsource(base) for base in plain.__mro__ if _is_pipeline(base))


def _is_pipeline(base: type) -> bool:
    return "__call__" in vars(base) and base.__module__ not in ("builtins", "typing")


def with_steps(plan: Plan, **changes: Any) -> Plan:
    """The plan with another step option."""
    return plan.model_copy(update={"step": replace(plan.step, **changes)})


def step_plan(degree: int, **options: Any) -> Plan:
    return Plan(step=Steps(degree=degree, **options))
