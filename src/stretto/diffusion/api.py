"""Run a diffusers pipeline under a plan: on ranks, or on virtual ranks of one process."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.calibration import resolved
from stretto.diffusion.deferred import Aside
from stretto.diffusion.hooks import Attachment, plain_copy, refuse_pickle
from stretto.diffusion.inputs import check_mesh, check_pipeline, check_predictors, plan_in
from stretto.diffusion.once import Once
from stretto.diffusion.predict import Predictor
from stretto.diffusion.remembered import Remembered
from stretto.diffusion.report import Report
from stretto.diffusion.weights import check_weights
from stretto.errors import PlanMismatch, UnsupportedPipeline
from stretto.mesh.local import LocalMesh, LocalWorld
from stretto.mesh.mesh import TIMEOUT_S, Mesh
from stretto.plan.model import Plan


@contextmanager
def parallelized(
    pipe: Any,
    plan: Plan | str | os.PathLike[str],
    *,
    mesh: Mesh,
    denoiser: str | None = None,
    predictor: Predictor | None = None,
    debug: bool = False,
) -> Iterator[Attachment]:
    """Inside the context, calls of a diffusers pipeline run under `plan` on the mesh's ranks.

    Every rank makes the same call and gets the same result. cfg is exact (up to the round-off of
    smaller batches, bitwise for whole calls); windows of several steps are approximate, with the
    error of every guess in `.report`. `plan` may be a plan file. `denoiser` names the component
    to hook in an unknown pipeline. `predictor` replaces the plan's by an object of yours with the
    methods of `predict.Predictor`. `debug` compares a hash of the latents at every window.
    Leaving restores the pipeline, also after an exception; two pipelines may be inside at once.
    Yields an Attachment: `.report` after a call, `.provisional` inside callbacks.
    All ranks enter together: whether they hold the same denoisers is asked there, by a hash of some
    elements of the weights. Raises ConfigError, PlanMismatch, UnsupportedPipeline, RanksDisagree
    before any call; in a call LatentsEdited, SplitMismatch, IncompleteWindow, HookDisplaced,
    NonFinite, RanksDisagree, RankLost.
    Source: ParaStep, NeurIPS 2025 (arXiv 2505.14741), section 3; classifier-free guidance over
    ranks as in xDiT (arXiv 2411.01738), section 3.
    """
    check_pipeline(pipe)
    check_mesh(mesh)
    if predictor is not None:
        check_predictors([predictor], 1)
    chosen = resolved(plan_in(plan), pipe, mesh=mesh, denoiser=denoiser)
    if dict(chosen.sizes) != dict(mesh.sizes):
        split = [a for a, size in chosen.sizes.items() if max(size, mesh.size(a)) > 1]
        ours, theirs = (_axes(sizes, split) for sizes in (chosen.sizes, mesh.sizes))
        raise PlanMismatch(
            f"the plan has {ours}, the mesh {theirs}; make the mesh with init_mesh(plan)"
        )
    options = {"denoiser": denoiser, "predictor": predictor, "debug": debug}
    attachment = Attachment(pipe, chosen, mesh, **options)
    check_weights(mesh, attachment.modules)
    attachment.attach()
    try:
        yield attachment
    finally:
        attachment.detach()


@contextmanager
def emulate(
    pipe: Any,
    plan: Plan | str | os.PathLike[str],
    *,
    denoiser: str | None = None,
    predictors: Sequence[Predictor] | None = None,
    batched: bool = False,
    reuse: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Emulation]:
    """Like `parallelized`, with all ranks played in turn by this process, on one device.

    The same code decides the same things, so the result is bitwise that of real ranks on the same
    kind of device; only the time is not. Yields an Emulation with `.report` (rank 0), `.reports`
    and `.results` of all ranks, and `.provisional` inside callbacks, which every rank calls.
    `predictors`, one per rank, replace the plan's.
    `batched` evaluates each window as one forward pass on W times the rows, which is faster where
    launching kernels takes the time, and equal up to round-off (Plan.cfg must be 1).
    `reuse` makes evaluations that several ranks repeat on equal inputs only once: the same bits
    sooner, from a denoiser that gives equal outputs for equal inputs. Reports count as for ranks.
    A stochastic scheduler needs an explicit generator: UnsupportedPipeline.
    """
    check_pipeline(pipe)
    if getattr(type(pipe), "is_emulated", False):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} is inside emulate() already, whose plan would be followed; "
            "leave that block first, or make a second pipeline of the same modules: "
            "copy.copy(pipe)"
        )
    chosen = resolved(plan_in(plan), pipe, denoiser=denoiser)
    if predictors is not None:
        check_predictors(predictors, chosen.world_size)
    plain = type(pipe)
    if batched and chosen.cfg.degree > 1:
        raise PlanMismatch(
            f"batched windows with cfg={chosen.cfg.degree}: one device holds both branches "
            "in one batch already; use cfg=1"
        )
    ways = {"batched": batched, "reuse": reuse, "timeout_s": timeout_s}
    emulation = Emulation(pipe, chosen, denoiser, predictors, **ways)

    class Emulated(plain):
        is_emulated = True
        __copy__ = plain_copy
        __reduce_ex__ = refuse_pickle

        @functools.wraps(plain.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return emulation.call(plain.__call__, *args, **kwargs)

        def __deepcopy__(self, memo: dict) -> Any:
            # Plain, since a copy of this class would run the original.
            emulated, self.__class__ = type(self), plain
            try:
                return copy.deepcopy(self, memo)
            finally:
                self.__class__ = emulated

    Emulated.__name__, Emulated.__qualname__ = plain.__name__, plain.__qualname__
    Emulated.__module__ = plain.__module__
    pipe.__class__ = Emulated
    try:
        yield emulation
    finally:
        pipe.__class__ = plain


@dataclass
class Emulation:
    """Virtual ranks around one pipeline: each has its own scheduler, all share the modules."""

    pipe: Any
    plan: Plan
    denoiser: str | None = None
    predictors: Sequence[Predictor] | None = None
    batched: bool = False
    reuse: bool = False
    timeout_s: float = TIMEOUT_S
    reports: list[Report] = field(default_factory=list)
    results: list = field(default_factory=list)

    def __post_init__(self):
        self._plain = type(self.pipe)
        self._remembered: dict[int, Remembered] = {}
        self._once: Once | None = None
        self._aside = Aside()
        self._busy = threading.Lock()
        #: A virtual rank is a thread: each finds its own attachment here.
        self._here = threading.local()

    @property
    def provisional(self) -> bool:
        """Inside a callback: True while the latents of the virtual rank that calls are guesses."""
        attachment = getattr(self._here, "attachment", None)
        return attachment is not None and attachment.provisional

    @property
    def report(self) -> Report | None:
        """Rank 0's report of the last call, None before the first."""
        return self.reports[0] if self.reports else None

    def call(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The call on every virtual rank; rank 0's result, and its generators' final states.

        Raises UnsupportedPipeline while another call is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise UnsupportedPipeline(
                f"{type(self.pipe).__name__} is called inside its own call, by a callback or "
                "another thread\n"
                "  why: its virtual ranks keep what they know of the pipeline between calls\n"
                "  to fix: a pipeline of its own for each, copy.copy(pipe), in a block of its own"
            )
        try:
            return self._call(original, args, kwargs)
        finally:
            self._busy.release()

    def _call(self, original: Any, args: tuple, kwargs: dict) -> Any:
        before = torch.get_rng_state()
        device = getattr(self.pipe, "device", "cpu")
        world = LocalWorld(self.plan.sizes, device=device, timeout_s=self.timeout_s)
        # Offloaded modules are at rest elsewhere.
        inherited = _modes(torch.device(getattr(self.pipe, "_execution_device", device)))
        self._once = Once() if self.reuse else None
        try:
            outcomes = world.run(lambda mesh: self._rank(mesh, inherited, original, args, kwargs))
        except BaseException:
            # Some ranks may have seen a form of call that others have not reached.
            self._remembered.clear()
            raise
        finally:
            self._once = None
            # Asked first: ranks that drew different latents fail for many reasons after that.
            self._refuse_shared_draws(before)
        self.results = [result for result, _ in outcomes]
        self.reports = [report for _, report in outcomes]
        return self.results[0]

    def _refuse_shared_draws(self, before: Tensor) -> None:
        if not torch.equal(before, torch.get_rng_state()):
            raise UnsupportedPipeline(
                "this call drew from the default random generator, which virtual ranks share; pass "
                "generator=torch.Generator().manual_seed(...), or, where the pipeline does not "
                "hand it to the scheduler, use real ranks: parallelized(...) on a mesh"
            )

    def _rank(
        self, mesh: LocalMesh, inherited: Callable, original: Any, args: tuple, kwargs: dict
    ) -> tuple:
        pipe = self._clone(mesh.world_rank)
        if mesh.world_rank:
            args, kwargs = _own_generators((args, kwargs), {})
        predictor = self.predictors[mesh.world_rank] if self.predictors else None
        remembered = self._remembered.setdefault(mesh.world_rank, Remembered())
        attachment = Attachment(
            pipe,
            self.plan,
            mesh,
            denoiser=self.denoiser,
            predictor=predictor,
            remembered=remembered,
            batched=self.batched,
            once=self._once,
            aside=self._aside,
        ).attach()
        self._here.attachment = attachment
        try:
            with inherited():
                return attachment.call(original, *args, **kwargs), attachment.report
        finally:
            del self._here.attachment
            attachment.detach()

    def _clone(self, rank: int) -> Any:
        """A pipeline with its own scheduler and module objects over the same parameters."""
        clone = copy.copy(self.pipe)
        clone.__class__ = _interrupted_with(self.pipe, self._plain)
        clone.scheduler = copy.deepcopy(self.pipe.scheduler)
        for name, value in self.pipe.components.items():
            if isinstance(value, torch.nn.Module):
                vars(clone)[name] = copy.copy(value)
        if rank:
            clone._progress_bar_config = {"disable": True}
        return clone


def _interrupted_with(pipe: Any, plain: type) -> type:
    """The class of a virtual rank: `pipe._interrupt = True` in a callback reaches it."""

    class Virtual(plain):
        @property
        def _interrupt(self) -> bool:
            return vars(pipe).get("_interrupt", False)

        @_interrupt.setter
        def _interrupt(self, value: bool) -> None:
            pipe._interrupt = value

    Virtual.__name__, Virtual.__qualname__ = plain.__name__, plain.__qualname__
    Virtual.__module__ = plain.__module__
    return Virtual


def _own_generators(value: Any, copies: dict[int, torch.Generator]) -> Any:
    """The same arguments with generators of this virtual rank's own; one stays one."""
    if isinstance(value, torch.Generator):
        return copies.setdefault(id(value), value.clone_state())
    if isinstance(value, dict):
        return {key: _own_generators(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_own_generators(item, copies) for item in value)
    return value


def _modes(device: torch.device) -> Callable[[], ExitStack]:
    """Enters the caller's modes and, on a GPU, stream, which threads do not inherit."""
    kind = device.type
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.autocast(kind, dtype, enabled=autocast))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(torch.cuda.stream(stream))  # None changes nothing
        return stack

    return enter


def _axes(sizes: Mapping[str, int], names: Sequence[str]) -> str:
    return " x ".join(f"{axis} {sizes[axis]}" for axis in names)
