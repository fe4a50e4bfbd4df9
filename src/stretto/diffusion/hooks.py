"""The two hooks, denoiser forward and scheduler step, and the guard around the pipeline call.

Everything is put on instances and taken off again in reverse order; two pipelines may carry hooks
at once. Wrapping the instance's `forward` (or its compiled call) is the outermost place: it sees
what the pipeline passes, after offload and context-parallel hooks were registered.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stretto.diffusion import exchange
from stretto.diffusion.adapters import SIDE_NETWORKS, denoisers_of, family_of
from stretto.diffusion.batched import Meeting
from stretto.diffusion.deferred import Aside
from stretto.diffusion.denoise import NEVER_SPLIT, Denoise
from stretto.diffusion.inputs import check_alike, numbers_of
from stretto.diffusion.once import Once
from stretto.diffusion.predict import Predictor
from stretto.diffusion.randomness import Randomness
from stretto.diffusion.remembered import Remembered
from stretto.diffusion.report import Report
from stretto.diffusion.scheduler import SchedulerPort
from stretto.diffusion.steps import StepRun
from stretto.errors import (
    ConfigError,
    HookDisplaced,
    LatentsEdited,
    MeshTimeout,
    RankLost,
    UnsupportedPipeline,
)
from stretto.mesh.local import LocalMesh
from stretto.mesh.mesh import WARMING_UP, Mesh
from stretto.plan.model import Plan

#: Marks a wrapper as ours, so that a second attachment to one module is noticed.
_OURS = "__stretto__"


class Attachment:
    """A pipeline under a plan: `report` of the last call, `provisional` in the present one."""

    #: Makes the state machine of a call; calibration puts one here that measures.
    run_type: Callable[..., StepRun] = StepRun

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        mesh: Mesh,
        *,
        denoiser: str | None = None,
        predictor: Predictor | None = None,
        remembered: Remembered | None = None,
        batched: bool = False,
        once: Once | None = None,
        aside: Aside | None = None,
        debug: bool = False,
    ):
        self.pipe = pipe
        self.plan = plan
        self.mesh = mesh
        self.predictor = predictor
        self.batched = batched
        self.debug = debug
        self._once = once
        self._aside = aside or Aside()
        self.family = family_of(pipe)
        self._signature = inspect.signature(type(pipe).__call__)
        self.report: Report | None = None
        self._run: StepRun | None = None
        self._remembered = remembered or Remembered()
        self._undo: list[Callable[[], None]] = []
        self._in_place: list[Callable[[], bool]] = []
        self.modules = denoisers_of(pipe, denoiser)
        if self.family.checked:
            self._remembered.verified.update(self.modules)
        self._refuse()
        self.port = SchedulerPort(pipe.scheduler)

    @property
    def provisional(self) -> bool:
        """True while the latents that a callback sees are guesses."""
        return self._run is not None and self._run.provisional

    # ---- on and off ------------------------------------------------------------------------

    def attach(self) -> Attachment:
        try:
            for name, module in self.modules.items():
                self._wrap_module(name, module)
            self._wrap_scheduler()
            self._guard_call()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._in_place.clear()

    def _refuse(self) -> None:
        if self.plan.step.degree == 1:
            return
        if self.family.refused:
            raise UnsupportedPipeline(
                f"{type(self.pipe).__name__} cannot take step={self.plan.step.degree}: "
                f"{self.family.refused}; use Plan(cfg=...) alone"
            )
        for name, module in self.modules.items():
            if getattr(module, "is_cache_enabled", False):
                raise UnsupportedPipeline(
                    f"{name} has a step cache enabled, which expects consecutive calls; "
                    "call disable_cache() on it, or use step=1"
                )

    # ---- the hooks ---------------------------------------------------------------------------

    def _wrap_module(self, name: str, module: torch.nn.Module) -> None:
        # Inside a region compiled in place the hook would recompile at every call.
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        attribute = "_compiled_call_impl" if compiled else "forward"
        original = getattr(module, attribute)
        if hasattr(vars(module).get(attribute), _OURS):
            raise UnsupportedPipeline(
                f"{name} already belongs to a parallelized pipeline; give each pipeline modules of "
                "its own, or leave the first context before entering the second"
            )
        splits = name not in SIDE_NETWORKS
        never_split = NEVER_SPLIT | self.family.never_split
        evaluate = self._once.wrapped(name, original) if self._once else original

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._run is None:
                return original(*args, **kwargs)
            return self._run.denoise(Denoise(name, evaluate, args, kwargs, splits, never_split))

        setattr(forward, _OURS, True)
        self._put(module, attribute, forward)

    def _wrap_scheduler(self) -> None:
        scheduler = self.pipe.scheduler
        original, regrid = scheduler.step, getattr(scheduler, "set_timesteps", None)

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._run is None:
                return original(*args, **kwargs)
            return self._run.step(*args, **kwargs)

        self._put(scheduler, "step", SchedulerHook(scheduler, original, step, self._second))
        for name, other in list(vars(self.pipe).items()):
            if other is not scheduler and hasattr(other, "set_timesteps"):
                self._put(other, "step", self._second(name, other.step))
        self._in_place.append(lambda: self.pipe.scheduler is scheduler)
        if regrid is None:
            return

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            if self._run is not None:
                self._run.reset()
            return regrid(*args, **kwargs)

        hook = SchedulerHook(scheduler, regrid, set_timesteps, lambda name, plain: plain)
        self._put(scheduler, "set_timesteps", hook)

    def _second(self, name: str, plain: Callable) -> Callable:
        """The step of a further scheduler: its latents would not be replayed, so no windows."""

        @functools.wraps(plain)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._run is not None and self.plan.step.degree > 1:
                raise UnsupportedPipeline(
                    f"{type(self.pipe).__name__} steps a second scheduler ({name}) beside "
                    f"pipe.scheduler, which step={self.plan.step.degree} cannot replay; use "
                    "Plan(cfg=...) alone"
                )
            return plain(*args, **kwargs)

        return step

    def _put(self, owner: Any, attribute: str, wrapper: Callable) -> None:
        """Set an instance attribute so that its removal leaves no trace."""
        own = vars(owner)
        had, before = attribute in own, own.get(attribute)
        own[attribute] = wrapper

        def undo() -> None:
            # Somebody may have wrapped ours since; without a run ours only passes calls on.
            if own.get(attribute) is wrapper:
                own.update({attribute: before}) if had else own.pop(attribute)

        self._undo.append(undo)
        self._in_place.append(lambda: own.get(attribute) is wrapper)

    def _guard_call(self) -> None:
        """Swap the instance's class for one whose call opens and closes a run."""
        pipe, attachment, plain = self.pipe, self, type(self.pipe)

        class Guarded(plain):
            __copy__ = plain_copy
            __reduce_ex__ = refuse_pickle

            @functools.wraps(plain.__call__)
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return attachment.call(plain.__call__, *args, **kwargs)

            def __deepcopy__(self, memo: dict) -> Any:
                return attachment.deep_copy(memo)

            @property
            def interrupt(self) -> bool:
                run = attachment._run
                own = bool(getattr(self, "_interrupt", False))
                return own if run is None else run.poll_interrupt()

        Guarded.__name__, Guarded.__qualname__ = plain.__name__, plain.__qualname__
        Guarded.__module__ = plain.__module__
        pipe.__class__ = Guarded
        self._undo.append(lambda: setattr(pipe, "__class__", plain))

    def deep_copy(self, memo: dict) -> Any:
        """A deep copy of the pipeline without the plan. Raises UnsupportedPipeline, HookDisplaced.

        Hooks are off meanwhile: copied wrappers would run the original's modules and schedulers.
        """
        if self._run is not None:
            raise UnsupportedPipeline(
                f"{type(self.pipe).__name__} is deep-copied inside its own call, by a callback\n"
                "  why: the copy would be under the plan of a call that it is no part of\n"
                "  to fix: copy it before the call"
            )
        self._check_in_place()
        self.detach()
        try:
            return copy.deepcopy(self.pipe, memo)
        finally:
            self.attach()

    # ---- one call ------------------------------------------------------------------------------

    def call(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline's own call under a fresh run; its result is never provisional."""
        if self._run is not None:
            raise UnsupportedPipeline(
                f"{type(self.pipe).__name__} is called inside its own call, by a callback; give "
                "the callback a pipeline of its own"
            )
        self._check_in_place()
        self._refuse()
        self._remembered.trim()
        check_alike(self.mesh, self.plan, numbers_of(self._signature, [self.pipe, *args], kwargs))
        generators = _generators([*args, *kwargs.values()])
        randomness = Randomness(generators, own_only=isinstance(self.mesh, LocalMesh))
        randomness.adopt(self.mesh)
        self._run = self._new_run(randomness)
        usual_s = self.mesh.timeout_s
        self.mesh.allow(WARMING_UP * usual_s)
        try:
            result = original(self.pipe, *args, **kwargs)
            self.report = self._run.finish()
            return result
        except BaseException as error:
            self._leave_peers(error)
            raise
        finally:
            self._run = None
            self.mesh.allow(usual_s)

    def _check_in_place(self) -> None:
        if not all(check() for check in self._in_place):
            raise HookDisplaced(
                f"{type(self.pipe).__name__}: a hooked method or the scheduler was replaced after "
                "parallelized() began; set up compile, offload and the scheduler before it"
            )

    def _leave_peers(self, error: BaseException) -> None:
        """Say why this rank ends; end the waits of the others, unless they end by themselves.

        What stretto refuses it refuses on every rank, and so does a pipeline before its first
        denoiser call, mostly: ranks tell one another. The mesh then remains of use. Callbacks may
        edit on one rank alone.
        """
        assert self._run is not None, "called while a run is on"
        reason = f"{type(error).__name__}: {error}"
        self.mesh.record(f"failed: {reason}")
        is_refusal = isinstance(error, ConfigError) and not isinstance(error, LatentsEdited)
        is_alone = self._run.has_begun and not is_refusal
        if not self._run.has_begun and not self._run.has_opened and isinstance(error, Exception):
            is_alone = self._is_absent_alone(reason)
        if self.mesh.world_size > 1 and is_alone:
            self.mesh.abort(f"step {self._run.position}: {reason}")

    def _is_absent_alone(self, reason: str) -> bool:
        """Tell ranks that may be at their first denoiser call; whether any is."""
        if self.mesh.world_size == 1 or isinstance(self.mesh, LocalMesh):
            # Virtual ranks hear of it when this one ends.
            return False
        with contextlib.suppress(RankLost, MeshTimeout):
            # What this rank raises says more than what became of the others.
            return not exchange.absent(self.mesh, reason)
        return True

    def _new_run(self, randomness: Randomness) -> StepRun:
        pipe = self.pipe
        if hasattr(pipe, "_num_timesteps"):
            pipe._num_timesteps = None
        return self.run_type(
            self.plan,
            self.mesh,
            self.port,
            self._remembered,
            randomness,
            says=PipelineSays(pipe),
            predictor=self.predictor,
            meeting=Meeting(self.mesh) if self.batched else None,
            aside=self._aside,
            debug=self.debug,
        )


def plain_copy(pipe: Any) -> Any:
    """A shallow copy of a pipeline under a plan, of its own class: it runs without the plan."""
    plain: Any = type(pipe).__bases__[0]
    copied = plain.__new__(plain)
    vars(copied).update(vars(pipe))
    return copied


def refuse_pickle(pipe: Any, protocol: Any) -> Any:
    """In place of a pipeline's reduction while it is under a plan."""
    raise UnsupportedPipeline(
        f"{type(pipe).__name__} is pickled under a plan, whose hooks no pickle takes\n"
        "  to fix: leave the block first, or use save_pretrained"
    )


class SchedulerHook:
    """A hooked scheduler method. A deep copy of the scheduler gets a method of its own back.

    `stand_in(name, plain)` makes the copy's method from its plain one.
    """

    def __init__(self, owner: Any, plain: Callable, hooked: Callable, stand_in: Callable):
        self._owner = owner
        self._hooked = hooked
        self._stand_in = stand_in
        self._name = plain.__name__
        functools.update_wrapper(self, plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooked(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        copied = memo[id(self._owner)]
        return self._stand_in("a copy", getattr(type(copied), self._name).__get__(copied))


class PipelineSays:
    """What a diffusers pipeline keeps about a call on itself."""

    def __init__(self, pipe: Any):
        self._pipe = pipe

    def num_timesteps(self) -> int | None:
        return getattr(self._pipe, "_num_timesteps", None)

    def interrupt(self) -> bool:
        return bool(getattr(self._pipe, "_interrupt", False))


def _generators(arguments: Sequence[Any]) -> list[torch.Generator]:
    """Generators among a call's arguments, wherever they are."""
    found = []
    for value in arguments:
        items = value if isinstance(value, (list, tuple)) else [value]
        found += [item for item in items if isinstance(item, torch.Generator)]
    return list({id(g): g for g in found}.values())
