"""One generation, step by step: which rank evaluates what, and how the true latents come about.

A window of W steps starting at step n has positions 0 .. W-1. Step rank r evaluates the denoiser
at position r only, on latents it reached with guesses; then the guided predictions are gathered.
Replay walk: every rank takes all W true scheduler steps with them. Leader walk: rank 0 takes each
true step as its prediction arrives, for pipelines that edit latents between steps.
Source: ParaStep, NeurIPS 2025 (arXiv 2505.14741), section 3, generalised.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from stretto.diffusion import exchange
from stretto.diffusion.batched import Meeting
from stretto.diffusion.exchange import Header
from stretto.diffusion.guidance import Branches, Denoise, tensors_of
from stretto.diffusion.predict import Predictor, make_predictor
from stretto.diffusion.randomness import Randomness
from stretto.diffusion.remembered import Remembered
from stretto.diffusion.report import Report, WindowRecord
from stretto.diffusion.scheduler import SchedulerPort, StepCall, extras_of, sample_of
from stretto.diffusion.windows import Schedule
from stretto.errors import (
    IncompleteWindow,
    LatentsEdited,
    PlanMismatch,
    RanksDisagree,
    UnsupportedPipeline,
)
from stretto.mesh.count import CountingMesh
from stretto.mesh.mesh import Mesh
from stretto.plan.model import Plan
from stretto.plan.options import Adaptive


class Says(Protocol):
    """What the pipeline itself says of a call under way."""

    def num_timesteps(self) -> int | None: ...
    def interrupt(self) -> bool: ...


@dataclass
class Window:
    """A window under way on this rank."""

    index: int
    start: int
    size: int
    opened_s: float = field(default_factory=time.perf_counter)
    state: dict[str, Any] | None = None
    random: Any = None
    calls: list[StepCall] = field(default_factory=list)
    guess: Tensor | None = None
    guided: Tensor | None = None


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
        debug: bool = False,
    ):
        self.plan = plan
        self.mesh = CountingMesh(mesh)
        self.port = port
        self.branches = Branches(plan.cfg, self.mesh, remembered.verified)
        self.remembered = remembered
        self.randomness = randomness
        self.debug = debug
        self.rank = mesh.rank("step")
        self.interrupted = False
        self._says = says
        self._predictor = predictor
        self._meeting = meeting
        self._begin()

    def _begin(self) -> None:
        """Before the first step; `set_timesteps` comes back here."""
        damping = getattr(self.plan.step.windows, "damping", ())
        self.predictor = self._predictor or make_predictor(self.plan.step.guesses, damping)
        self.predictor.reset()
        self.report = Report(self.plan)
        self.schedule: Schedule | None = None
        self.noise: list[float] = []
        self.walk = self.plan.step.walk
        if self.walk == "leader":
            self.report.walk = self.walk
            self._refuse_adaptive_leader()
        self.position = self._polled = 0
        self.window = Window(0, 0, 1)
        self._call_counts: Counter[str] = Counter()
        self._recent: list[Tensor] = []
        self._last: Any = None
        self._recurrent: dict[str, int] = {}
        self._errors: Sequence[float] = ()

    # ---- what the hooks call -------------------------------------------------------------

    def reset(self) -> None:
        """The scheduler got a new grid: what follows is another sequence of steps."""
        self._refuse_open_window("the scheduler's timesteps were set anew")
        self._begin()

    def denoise(self, call: Denoise) -> Any:
        """A denoiser call: the true output on the ranks that own it, a remembered one elsewhere."""
        if not self._call_counts:
            self.mesh.record(f"window {self.window.index}: evaluating step {self.position}")
            self._check_start(call)
        call.index = self._call_counts[call.module]
        self._call_counts[call.module] += 1
        key = call.key
        known = self.remembered.get(key)
        if self._evaluates or known is None:
            output = self._evaluate(call, known)
            self.remembered.put(key, output)
            return output
        return known

    def poll_interrupt(self) -> bool:
        """Whether rank 0 asked to stop; ranks agree once per position, never inside a window."""
        if self.mesh.world_size == 1:
            self.interrupted = self._says.interrupt()
        elif not self.provisional and self._polled < self.position:
            self._polled = self.position
            flag = torch.tensor([self._says.interrupt()], dtype=torch.uint8)
            told = self.mesh.broadcast(flag, None, 0, "control").wait()
            self.interrupted = self.interrupted or bool(told)
        return self.interrupted

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """A scheduler step: true now, or when its window closes."""
        call = self.port.bind(*args, **kwargs)
        self._check_alternation()
        self._find_recurrent(call)
        self._watch_for_edits(call)
        result = self._exact(call) if self.window.size == 1 else self._parallel(call)
        self._advance(call, result)
        return result

    def finish(self) -> Report:
        """The pipeline returned: close the report. Raises IncompleteWindow."""
        self._refuse_open_window("the pipeline ended")
        self.report.num_steps = self.position
        self.report.close(self.mesh)
        return self.report

    @property
    def provisional(self) -> bool:
        """True while latents are guesses: inside a window, before its exchange."""
        return self.position > self.window.start

    # ---- one step ------------------------------------------------------------------------

    @property
    def _is_planned(self) -> bool:
        return self.schedule is not None

    @property
    def _shares_exact_steps(self) -> bool:
        """The published schedule computes its exact steps on every rank."""
        return self.plan.step.exact_split and self.plan.step.guesses != "own"

    @property
    def _evaluates(self) -> bool:
        inside = self.position - self.window.start
        return self.window.size == 1 or inside == self.rank

    def _evaluate(self, call: Denoise, known: Any) -> Any:
        """A true output: of this rank alone, of the ranks that share it, or of a joint batch."""
        if self._meeting and self._evaluates and self.window.size > 1:
            self.report.count(1, planned=True)
            return self._meeting.evaluate(call, self.window.start, self.window.size)
        shared = self._is_planned and self.window.size == 1 and self._shares_exact_steps
        before = self.branches.runs
        output = self.branches.evaluate(call, known, share_step=shared)
        self.report.count(self.branches.runs - before, planned=self._evaluates)
        return output

    def _exact(self, call: StepCall) -> Any:
        call = call.replaced(model_output=self.branches.settle(call.guided))
        exchange.check_finite(call.guided, self.mesh.world_rank, self.position)
        self.window.calls.append(call)
        result = self.port.real(call)
        self._remember(self.position, call.guided)
        return result

    def _parallel(self, call: StepCall) -> Any:
        inside = self.position - self.window.start
        if inside == 0:
            self.window.state = self.port.snapshot()
            self.window.random = self.randomness.snapshot()
        if inside == self.rank:
            if self._meeting:
                self._meeting.leave(self.window.start, self.window.size)
            call = call.replaced(model_output=self.branches.settle(call.guided))
            self.window.guided, self.window.guess = call.guided, call.sample
        self.window.calls.append(call)
        return self._lead(call, inside) if self.walk == "leader" else self._replay(call, inside)

    def _replay(self, call: StepCall, inside: int) -> Any:
        if inside == self.window.size - 1:
            return self._close_replay()
        return self._toward_own(call, inside)

    def _toward_own(self, call: StepCall, inside: int) -> Any:
        """Walk with guesses up to this rank's own position, then stand still."""
        if inside >= self.rank or self.rank >= self.window.size:
            return self.port.unmoved(call)
        own = call.guided
        if self.predictor.needs_own_output and self.branches.holds_whole_calls:
            own = self.branches.led(own)
        guess = self.predictor.guess(self.noise[self.position], inside + 1, own_output=own)
        return self.port.real(call.replaced(model_output=guess))

    # ---- the end of a window ---------------------------------------------------------------

    def _close_replay(self) -> Any:
        """Gather, go back to the window's start, take every true step."""
        window = self.window
        self.mesh.record(f"window {window.index}: waiting for predictions", waiting=True)
        like = window.calls[0].guided
        guided = exchange.gather(self.mesh, window.guided, like, self._header(like))
        guesses = self._guessed_latents() if self._carries else []
        self._rewind()
        result = self._last
        for inside, (call, true) in enumerate(zip(window.calls, guided, strict=True)):
            if inside:
                call = self._continued(call, result)
            self._measure(inside, call.sample)
            if guesses:
                true = self._carried(true, call.sample, guesses[inside], window.start + inside)
            result = self.port.real(call.replaced(model_output=true))
            self._remember(window.start + inside, true)
        return result

    def _rewind(self) -> None:
        """Scheduler and generators as they were at the window's start."""
        assert self.window.state is not None, "a window of several steps keeps its first state"
        self.port.restore(self.window.state)
        self.randomness.restore(self.window.random)

    @property
    def _carries(self) -> bool:
        """Whether predictions are carried from guessed to true latents; the published never are."""
        here = self.noise[self.window.start]
        return not self.predictor.needs_own_output and self.port.carry(here) != 0

    def _guessed_latents(self) -> list[Tensor]:
        """The latents on which every position's prediction was evaluated.

        All ranks hold the history that guesses come from, so each walks them by itself: what the
        scheduler computes need not be sent.
        """
        self._rewind()
        window, result = self.window, self._last
        latents = []
        for inside, call in enumerate(window.calls):
            if inside:
                call = self._continued(call, result)
            latents.append(call.sample)
            if inside < window.size - 1:
                guess = self.predictor.guess(self.noise[window.start + inside], inside + 1)
                result = self.port.real(call.replaced(model_output=guess))
        return latents

    def _carried(self, guided: Tensor, true: Tensor, guess: Tensor, position: int) -> Tensor:
        """A prediction made on `guess`, for the true latents; unchanged bits where they agree."""
        if guided.shape != true.shape:
            # Learned variances ride along in more channels: nothing is known of their change.
            return guided
        factor = self.port.carry(self.noise[position])
        wide = torch.promote_types(guided.dtype, torch.float32)
        moved = guided.to(wide) + factor * (true.to(wide) - guess.to(wide))
        return torch.where(true == guess, guided, moved.to(guided.dtype))

    def _continued(self, call: StepCall, result: Any) -> StepCall:
        """A recorded call on the true sample, cast as the pipeline cast it, with carried extras."""
        carried = {name: extras_of(result)[k] for name, k in self._recurrent.items()}
        return call.replaced(sample=sample_of(result).to(call.sample.dtype), **carried)

    def _measure(self, inside: int, true: Tensor) -> None:
        """Relative error of the latents on which this rank evaluated its prediction."""
        if inside != self.rank or self.window.guess is None:
            return
        error = (true.float() - self.window.guess.float()).square().mean().sqrt()
        scale = true.float().square().mean().sqrt().clamp_min(1e-30)
        self.report.own_error(self.window.start + inside, error / scale)

    def _header(self, like: Tensor) -> Header:
        first = self.window.calls[0].sample
        return Header(
            rank=self.rank,
            start=self.window.start,
            size=self.window.size,
            dtype=str(like.dtype).removeprefix("torch."),
            device=like.device.type,
            shape=tuple(like.shape),
            digest=exchange.digest(first) if self.debug else bytes(16),
        )

    # ---- the leader walk -------------------------------------------------------------------

    def _lead(self, call: StepCall, inside: int) -> Any:
        """Rank 0 takes true steps as predictions arrive; its result reaches all at the end."""
        is_last = inside == self.window.size - 1
        if inside and self.rank in (0, inside):
            moved = self.mesh.permute(call.guided, "step", {inside: 0}, "window").wait()
            call = call if moved is None else call.replaced(model_output=moved)
        if self.rank == 0:
            exchange.check_finite(call.guided, self.mesh.world_rank, self.position)
            result = self.port.real(call)
            self._remember(self.position, call.guided)
            return self._share(result) if is_last else result
        return self._share(None) if is_last else self._toward_own(call, inside)

    def _share(self, result: Any) -> Any:
        """Rank 0's step result, scheduler and generator states, and history, on every rank."""
        self.mesh.record(f"window {self.window.index}: waiting for rank 0", waiting=True)
        size, start = self.window.size, self.window.start
        content = None
        if self.rank == 0:
            content = {
                "result": result,
                "state": self.port.snapshot(),
                "random": self.randomness.snapshot(),
                "guided": self._recent[-size:],
            }
        content = _broadcast_object(self.mesh, content, self.mesh.device)
        if self.rank:
            self.port.restore(content["state"])
            self.randomness.restore(content["random"])
            for inside, guided in enumerate(content["guided"]):
                self._remember(start + inside, guided)
        return content["result"]

    # ---- between steps ---------------------------------------------------------------------

    def _remember(self, position: int, guided: Tensor) -> None:
        """A true prediction; the first one waits for the grid before it reaches the predictor."""
        self._recent = [*self._recent, guided][-self.plan.step.degree :]
        # A pipeline may walk its timesteps twice; nothing is guessed beyond the grid.
        if self._is_planned and position < len(self.noise):
            self.predictor.append(self.noise[position], guided)

    def _advance(self, call: StepCall, result: Any) -> None:
        self._last = result
        self._call_counts.clear()
        self.branches.next_step()
        self.randomness.mark()
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
        self.predictor.append(self.noise[0], self._recent[-1])
        self.report.begin(num_steps, self._recent[-1])

    def _next_window(self) -> None:
        window = self.window
        if self.position < len(self.noise):
            self.predictor.close_window(window.start, window.size)
        self.report.add(
            WindowRecord(window.start, window.size, time.perf_counter() - window.opened_s)
        )
        if self.position >= len(self.noise) - 1:
            self.window = Window(window.index + 1, self.position, 1)
            return
        assert self.schedule is not None, "windows are planned after the first step"
        if self.schedule.is_adaptive and window.size > 1:
            self._errors = self.report.shared_errors(self.mesh, window.start, window.size)
        size = self.schedule.size_at(window.index + 1, self.position, self._errors)
        self.window = Window(window.index + 1, self.position, size)

    # ---- what must not pass silently -------------------------------------------------------

    def _check_start(self, call: Denoise) -> None:
        """Ranks that start from other latents or embeddings would blend two pictures."""
        if self.position or self.mesh.world_size == 1:
            return
        # Asked of the mesh underneath: what control costs is not part of a plan's bytes.
        own = exchange.digest(*tensors_of((call.args, call.kwargs)))
        for rank, seen in enumerate(self.mesh.mesh.gather_bytes(own)):
            if seen != own:
                raise RanksDisagree(
                    f"first denoiser call: rank {rank} has inputs {seen.hex()[:8]}, rank "
                    f"{self.mesh.world_rank} {own.hex()[:8]} (hash of latents, timestep and "
                    "embeddings); pass the same prompt, seed and sizes on every rank"
                )

    def _check_alternation(self) -> None:
        if not self._call_counts:
            raise UnsupportedPipeline(
                f"step {self.position}: the scheduler stepped twice without a denoiser call "
                "between (two schedulers, or a denoiser that stretto did not find); "
                "name the module with denoiser=..., or run this pipeline on one rank"
            )

    def _find_recurrent(self, call: StepCall) -> None:
        """Arguments that are an extra output of the step before, found by identity."""
        if self._last is None or self.provisional:
            return
        for k, extra in enumerate(extras_of(self._last)):
            for name, value in call.named.items():
                if k and isinstance(extra, Tensor) and value is extra:
                    self._recurrent[name] = k

    def _watch_for_edits(self, call: StepCall) -> None:
        """Does the pipeline change latents, or draw random numbers, between two steps?"""
        if self._last is None or self.plan.step.degree == 1 or self.walk == "leader":
            return
        before = sample_of(self._last)
        same = before.shape == call.sample.shape and bool(
            (before.to(call.sample.dtype) == call.sample).all()
        )
        if same and not self.randomness.moved():
            return
        if self.walk == "auto" and self.position == 1:
            self.walk = self.report.walk = "leader"
            self._refuse_adaptive_leader()
        else:
            raise LatentsEdited(
                f"step {self.position}: the latents are not what step {self.position - 1} "
                "returned, so this pipeline or a callback edits them between steps; "
                'use Steps(walk="leader")'
            )

    def _refuse_adaptive_leader(self) -> None:
        if isinstance(self.plan.step.windows, Adaptive):
            raise PlanMismatch(
                "adaptive windows measure guess errors, which only the replay walk does; this "
                "pipeline is walked by a leader because it edits latents: use Tail() or Fixed()"
            )

    def _refuse_open_window(self, event: str) -> None:
        if self.provisional:
            raise IncompleteWindow(
                f"{event} at step {self.position}, inside the window of {self.window.size} steps "
                f"that began at step {self.window.start}; its latents are guesses. Use windows "
                f"that sum to the {self.position} steps taken, or Plan(step=1)"
            )


def _broadcast_object(mesh: Mesh, content: dict | None, device: torch.device) -> dict:
    """Rank 0's tensors and state on all step ranks; peers of one job trust each other's pickles."""
    buffer = io.BytesIO()
    if content is not None:
        torch.save(content, buffer)
    data = mesh.broadcast_bytes(buffer.getvalue(), "step")
    if content is not None:
        return content
    return torch.load(io.BytesIO(data), map_location=_onto(device), weights_only=False)


def _onto(device: torch.device) -> Callable:
    """Tensors of the host stay there, those of rank 0's device come to this rank's."""
    return lambda storage, where: storage if where == "cpu" else storage.to(device.type)
