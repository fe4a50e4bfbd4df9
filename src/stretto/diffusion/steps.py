"""One generation, step by step: which rank evaluates what, and how the true latents come about.

A window of W steps starting at step n has positions 0 .. W-1. Step rank r evaluates the denoiser
at position r only, on latents it reached with guesses; then the guided predictions are gathered.
Replay walk: every rank takes all W true scheduler steps with them. Leader walk: rank 0 takes each
true step as its prediction arrives, for pipelines that edit latents between steps.
Source: ParaStep, NeurIPS 2025 (arXiv 2505.14741), section 3, generalised.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stretto.diffusion import exchange
from stretto.diffusion.batched import Meeting
from stretto.diffusion.deferred import Aside, Deferred
from stretto.diffusion.denoise import Denoise, Passes, tensors_of
from stretto.diffusion.guidance import Branches
from stretto.diffusion.handover import Handover
from stretto.diffusion.leader import Leader
from stretto.diffusion.predict import Predictor, make_predictor
from stretto.diffusion.randomness import Randomness
from stretto.diffusion.remembered import Remembered
from stretto.diffusion.replay import Replay
from stretto.diffusion.report import Report, WindowRecord
from stretto.diffusion.scheduler import SchedulerPort, StepCall
from stretto.diffusion.walk import Walk
from stretto.diffusion.windows import Schedule
from stretto.errors import (
    ConfigError,
    IncompleteWindow,
    LatentsEdited,
    PlanMismatch,
    UnsupportedPipeline,
)
from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalMesh
from stretto.mesh.mesh import WARMING_UP, Mesh
from stretto.plan.model import Plan
from stretto.plan.options import Adaptive


class Says(Protocol):
    """What the pipeline itself says of a call under way."""

    def num_timesteps(self) -> int | None: ...
    def interrupt(self) -> bool: ...


class State(NamedTuple):
    """Scheduler and generators at one moment."""

    scheduler: dict[str, Any]
    random: list[Tensor]


@dataclass
class Window:
    """A window under way on this rank."""

    index: int
    start: int
    size: int
    opened_s: float = field(default_factory=time.perf_counter)
    #: At its start, and where this rank evaluates if that is neither the start nor the end.
    state: State | None = None
    own_state: State | None = None
    calls: list[StepCall] = field(default_factory=list)
    #: Guessed predictions of all positions but the last, which nobody walks beyond.
    guesses: Sequence[Tensor] | None = None
    #: The latents this rank reached with guesses, and its prediction on them.
    own_latents: Tensor | None = None
    guided: Tensor | None = None
    #: True predictions, where they come one by one.
    trues: list[Tensor] = field(default_factory=list)


class StepRun:
    """The state of one generation on one rank; a new call of the pipeline makes a new one."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        port: SchedulerPort,
        remembered: Remembered,
        randomness: Randomness,
        *,
        says: Says,
        predictor: Predictor | None = None,
        meeting: Meeting | None = None,
        aside: Aside | None = None,
        debug: bool = False,
    ):
        self.plan = plan
        self.mesh = CountingMesh(mesh)
        self.port = port
        port.begin()
        self.passes = Passes(remembered.verified)
        self.branches = Branches(plan.cfg, self.mesh, self.passes)
        self.remembered = remembered
        self.randomness = randomness
        self.debug = debug
        self.rank = mesh.rank("step")
        self.interrupted = False
        self._is_warm = False
        self._says = says
        self._predictor = predictor
        self._meeting = meeting
        self._aside = aside or Aside()
        self.report = Report(plan)
        #: Steps of the sequences before this one: a pipeline may denoise section after section.
        self.earlier = 0
        self._begin()

    def _begin(self) -> None:
        """Before the first step; `set_timesteps` comes back here."""
        damping = getattr(self.plan.step.windows, "damping", ())
        self.predictor = self._predictor or make_predictor(self.plan.step.guesses, damping)
        self.predictor.reset()
        self.schedule: Schedule | None = None
        self.noise: list[float] = []
        self.walk = self._replay()
        self.report.walk = self.walk.name
        self.handover = Handover(self.randomness)
        self.deferred = Deferred(self._aside)
        self.position = self._polled = 0
        self.window = Window(0, 0, 1)
        self._opening: Callable[[], None] | None = None
        #: Whether this rank has met the others at the first denoiser call.
        self.has_opened = False
        self._call_counts: Counter[str] = Counter()
        #: Where the denoiser's outputs of this step lie.
        self._own_memory: set[int] = set()
        self._errors: Sequence[float] = ()
        if self.plan.step.walk == "leader":
            self._follow_a_leader()

    def _replay(self) -> Walk:
        """The walk of pipelines that leave latents alone; calibration measures in its place."""
        return Replay(self)

    # ---- what the hooks call -------------------------------------------------------------

    def reset(self) -> None:
        """The scheduler got a new grid: what follows is another sequence of steps."""
        self._refuse_open_window("the scheduler's timesteps were set anew")
        self.earlier += self.position
        self._begin()

    def denoise(self, call: Denoise) -> Any:
        """A denoiser call: the true output on the ranks that own it, a remembered one elsewhere."""
        is_first = not self._call_counts
        if is_first:
            self.mesh.check()
            self.mesh.record(f"window {self.window.index}: evaluating step {self.position}")
        if is_first and self.position == 0:
            self.port.read_grid()
            grid = self.port.host_grid()
            self._opening = exchange.opening(self.mesh.mesh, call.args, call.kwargs, grid)
            exchanging = self.mesh.size("cfg") > 1 or self._shares_exact_steps
            if exchanging or isinstance(self.mesh.mesh, LocalMesh):
                # Their evaluations exchange tensors, which must be alike. Virtual ranks may share
                # the memory of an output: nobody's turn comes between it and its use.
                self._open()
        call.index = self._call_counts[call.module]
        self._call_counts[call.module] += 1
        if self.mesh.world_size == 1:
            # Nobody else evaluates, so nothing remembered will stand in.
            return self._evaluate(call, None)
        key = call.key
        known = self.remembered.get(key)
        if not self._evaluates and known is not None:
            self.branches.pass_over(call)
            return known
        output = self._evaluate(call, known)
        self._own_memory.update(_memory(tensor) for tensor in tensors_of(output))
        self._open()
        if known is None or self.predictor.needs_own_output:
            # Elsewhere what stands in is replaced by a guess: its form is all that matters.
            self.remembered.put(key, output)
        return output

    def _open(self) -> None:
        """Make the check of the first call that is due, while the device evaluates it."""
        check, self._opening = self._opening, None
        if check is not None:
            self.has_opened = True
            check()

    def poll_interrupt(self) -> bool:
        """Whether rank 0 asked to stop; ranks agree once per position, never inside a window."""
        if self.mesh.world_size == 1:
            self.interrupted = self._says.interrupt()
        elif not self.provisional and self._polled < self.position:
            self._polled = self.position
            flag = torch.tensor([self._says.interrupt()], dtype=torch.uint8, device="cpu")
            told = self.mesh.broadcast(flag, None, 0, "control").wait()
            self.interrupted = self.interrupted or bool(told)
        return self.interrupted

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """A scheduler step: true now, or when its window closes."""
        call = self.port.bind(*args, **kwargs)
        self._check_alternation()
        if self._has_windows:
            if not self.provisional:
                self.handover.find_recurrent(call)
            self._watch_for_edits(call)
            call = self._lasting(call)
        result = self._exact(call) if self.window.size == 1 else self._parallel(call)
        self._advance(call, result)
        return result

    def finish(self) -> Report:
        """The pipeline returned: close the report.

        Raises IncompleteWindow, and torch.linalg.LinAlgError for a singular matrix.
        """
        self._refuse_open_window("the pipeline ended")
        self.port.finish()
        self.deferred.finish()
        self.report.num_steps = self.earlier + self.position
        self.report.close(self.mesh)
        return self.report

    @property
    def has_begun(self) -> bool:
        """True from the first denoiser call on: peers may wait for this rank."""
        return self.earlier + self.position > 0 or bool(self._call_counts)

    @property
    def provisional(self) -> bool:
        """True while latents are guesses: inside a window, before its exchange."""
        return self.position > self.window.start

    # ---- one step ------------------------------------------------------------------------

    @property
    def _has_windows(self) -> bool:
        """Whether steps are ever guessed; else no scheduler step is taken twice."""
        return self.plan.step.degree > 1

    @property
    def _is_heard(self) -> bool:
        """Whether the predictor is told: a given one always, as it may be there to listen."""
        return self._has_windows or self._predictor is not None

    @property
    def _is_planned(self) -> bool:
        return self.schedule is not None

    @property
    def _shares_exact_steps(self) -> bool:
        """The published schedule computes its exact steps on every rank."""
        return self._has_windows and self.plan.step.exact_split and self.plan.step.guesses != "own"

    @property
    def _evaluates(self) -> bool:
        inside = self.position - self.window.start
        return self.window.size == 1 or inside == self.rank

    def _evaluate(self, call: Denoise, known: Any) -> Any:
        """A true output: of this rank alone, of the ranks that share it, or of a joint batch."""
        if self._meeting and self._evaluates and self.window.size > 1:
            self.report.count(1, planned=True)
            return self._meeting.evaluate(call, self.window.start, self.window.size)
        shared = self.window.size == 1 and self._shares_exact_steps
        before, checked = self.passes.count, self.passes.checks
        output = self.branches.evaluate(call, known, share_step=shared)
        self.report.count(self.passes.count - before, planned=self._evaluates)
        self.report.count(self.passes.checks - checked, planned=False)
        return output

    def _exact(self, call: StepCall) -> Any:
        call = call.replaced(model_output=self.branches.settle(call.guided))
        exchange.check_finite(call.guided, self.position, self.deferred, rank=self.rank)
        self.window.calls.append(call)
        # A denoiser that runs as a graph puts its next output where this one lies.
        is_lent = _memory(call.guided) in self._own_memory
        lasting = call.guided.clone() if is_lent else call.guided
        result = self.port.real(call)
        self.window.trues.append(lasting)
        if self._is_planned:
            self.learn([lasting])
        return result

    def _parallel(self, call: StepCall) -> Any:
        inside = self.position - self.window.start
        if inside == 0:
            self.window.state = self.state()
        if inside == self.rank:
            if self._meeting:
                self._meeting.leave(self.window.start, self.window.size)
            call = call.replaced(model_output=self.branches.settle(call.guided))
            self.window.guided, self.window.own_latents = call.guided, call.sample
        self.window.calls.append(call)
        return self.walk.step(call, inside)

    def state(self) -> State:
        """A copy of what a scheduler step changes."""
        return State(self.port.snapshot(), self.randomness.snapshot())

    def restore(self, state: State) -> None:
        """Scheduler and generators as they were; the state can be used again."""
        self.port.restore(state.scheduler)
        self.randomness.restore(state.random)

    def guesses(self) -> Sequence[Tensor]:
        """Guessed predictions of the window under way, equal on all ranks."""
        window = self.window
        if window.guesses is None:
            ahead = self.noise[window.start : window.start + window.size - 1]
            try:
                window.guesses = self._guessed(ahead)
            except ConfigError as error:
                # Not every rank guesses, and those that do not would wait for this one.
                self.mesh.abort(f"step {self.position}: {error}")
                raise
        return window.guesses

    def _guessed(self, ahead: Sequence[float]) -> Sequence[Tensor]:
        made = self.predictor.guesses(ahead)
        if len(made) != len(ahead):
            raise ConfigError(
                f"{type(self.predictor).__name__}.guesses returned {len(made)} predictions for "
                f"{len(ahead)} steps\n  to fix: one for every noise fraction it is given"
            )
        return made

    # ---- between steps ---------------------------------------------------------------------

    def learn(self, guided: Sequence[Tensor]) -> None:
        """Tell the predictor what the predictions of the window under way truly were.

        Always on the second stream: memory that the predictor drops is then not given away to the
        steps while that stream still reads it.
        """
        start, size = self.window.start, len(guided)
        if not self._is_heard:
            return
        with self.deferred.aside(*guided):
            # A pipeline may walk its timesteps twice; nothing is guessed beyond the grid.
            for s, g in zip(self.noise[start:], guided, strict=False):
                self.predictor.append(s, g)
            if start + size < len(self.noise):
                self.predictor.close_window(start, size)

    def _advance(self, call: StepCall, result: Any) -> None:
        if self._has_windows:
            self.handover.leave(result)
        self._call_counts.clear()
        self._own_memory.clear()
        self.branches.next_step()
        self.position += 1
        if not self._is_planned:
            self._plan(call)
        if self.position == self.window.start + self.window.size:
            self._next_window()

    def _plan(self, call: StepCall) -> None:
        """After the first step the scheduler's grid, and so the windows, are known."""
        first = self.port.position(call.named.get("timestep"))
        total = len(self.port.scheduler.timesteps) - first
        own = self._says.num_timesteps()
        num_steps = min(total, own) if own else total
        self.noise = self.port.noise(first, num_steps)
        self.schedule = Schedule(self.plan.step, self.noise)
        self.schedule.size_at(0, 0, ())
        (first_guided,) = self.window.trues
        self.learn([first_guided])
        self.report.begin(num_steps, first_guided)

    def _next_window(self) -> None:
        window = self.window
        self.deferred.close_window()
        if window.size > 1 and not self._is_warm:
            # Every denoiser call of this form has been made once, on every rank.
            self._is_warm = True
            self.mesh.allow(self.mesh.mesh.timeout_s / WARMING_UP)
        self.report.add(
            WindowRecord(
                self.earlier + window.start, window.size, time.perf_counter() - window.opened_s
            )
        )
        if self.position >= len(self.noise) - 1:
            self.window = Window(window.index + 1, self.position, 1)
            return
        assert self.schedule is not None, "windows are planned after the first step"
        if self.schedule.is_adaptive and window.size > 1:
            start = self.earlier + window.start
            self._errors = self.report.shared_errors(self.mesh, start, window.size)
        size = self.schedule.size_at(window.index + 1, self.position, self._errors)
        self.window = Window(window.index + 1, self.position, size)

    # ---- what must not pass silently -------------------------------------------------------

    def _check_alternation(self) -> None:
        if not self._call_counts:
            raise UnsupportedPipeline(
                f"step {self.position}: the scheduler stepped twice without a denoiser call "
                "between (two schedulers, or a denoiser that stretto did not find); "
                "name the module with denoiser=..., or run this pipeline on one rank"
            )

    def _watch_for_edits(self, call: StepCall) -> None:
        """Does the pipeline change latents, or draw random numbers, between two steps?"""
        if isinstance(self.walk, Leader):
            return
        edited = self.handover.edited(call)
        if edited is None:
            return
        if self.plan.step.walk == "auto" and self.position == 1:
            # The only answer that decides something, and the only one waited for.
            if bool(edited):
                self._follow_a_leader()
            return
        self.deferred.check(edited, partial(_refuse_edits, self.position))

    def _lasting(self, call: StepCall) -> StepCall:
        """The call on latents of its own, if the pipeline overwrites those that it gives."""
        was_known = self.handover.overwrites
        call = self.handover.lasting(call)
        is_late = self.handover.overwrites and not was_known and self.provisional
        if is_late and not isinstance(self.walk, Leader):
            raise LatentsEdited(
                f"step {self.position}: the pipeline or a callback wrote into the latents of step "
                f"{self.position - 1} after that step, inside a window, so it cannot be replayed; "
                'use Steps(walk="leader")'
            )
        return call

    def _follow_a_leader(self) -> None:
        if isinstance(self.plan.step.windows, Adaptive):
            raise PlanMismatch(
                "adaptive windows measure guess errors, which only the replay walk does; this "
                "pipeline is walked by a leader (asked for, or because it edits latents): use "
                "Tail() or Fixed()"
            )
        self.walk = Leader(self)
        self.report.walk = self.walk.name

    def _refuse_open_window(self, event: str) -> None:
        if self.provisional:
            raise IncompleteWindow(
                f"{event} at step {self.position}, inside the window of {self.window.size} steps "
                f"that began at step {self.window.start}; its latents are guesses. Use windows "
                f"that sum to the {self.position} steps taken, or Plan(step=1)"
            )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refuse_edits(position: int, edited: Tensor) -> None:
    if edited:
        raise LatentsEdited(
            f"step {position}: the latents are not what step {position - 1} "
            "returned, so this pipeline or a callback edits them between steps; "
            'use Steps(walk="leader")'
        )
