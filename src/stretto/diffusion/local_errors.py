"""What a window would cost, wherever it starts: errors measured from true latents.

One sequential run is recorded. Then passes through the real pipeline walk windows 1 x k, P, P ...
for each offset k; a window starts from recorded latents and history, takes the same guesses and
true steps as ranks would, and is put back on the record at its end. The guess for a position does
not depend on the positions after it, so a window of P steps holds those of 2 .. P - 1 too.
Source: design brief of step parallelism, section 4.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.hooks import Attachment
from stretto.diffusion.predict import Extrapolation
from stretto.diffusion.replay import Replay
from stretto.diffusion.report import Report
from stretto.diffusion.scheduler import StepCall, sample_of
from stretto.diffusion.steps import StepRun
from stretto.diffusion.walk import Walk
from stretto.errors import LatentsEdited, UnsupportedPipeline
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Steps
from stretto.search import windows as search

Call = Mapping[str, Any]
#: (start, size) -> mean squared error of the latents after the window.
Errors = dict[tuple[int, int], float]

# A call that draws other numbers each time is off by about 1; nondeterministic kernels by 1e-6.
_REPRODUCIBLE = 1e-2


@dataclass
class Record:
    """A sequential run: per step the guided prediction, what the step returned, states before it.

    `noise` holds s_0 .. s_N. `guidance`: whether the pipeline said it guides, None if it is mute.
    """

    noise: list[float] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    random: list[list[Tensor]] = field(default_factory=list)
    guidance: bool | None = None

    @property
    def num_steps(self) -> int:
        return len(self.guided)

    def check_repeats(self, step: int, guided: Tensor) -> None:
        """Raise UnsupportedPipeline for a prediction that is not the recorded one."""
        known = self.guided[step]
        off = (guided.double() - known.double()).norm() / known.double().norm().clamp_min(1e-30)
        if not off <= _REPRODUCIBLE:
            raise UnsupportedPipeline(
                f"the call does not repeat: at step {step} the prediction is off by {off:.1%} of "
                "what the same call predicted before; pass "
                "generator=torch.Generator().manual_seed(...) in every call"
            )

    def clear(self) -> None:
        for values in (self.noise, self.guided, self.results, self.states, self.random):
            values.clear()


def record(pipe: Any, call: Call, *, denoiser: str | None = None) -> Record:
    """The pipeline's own sequential run of `call`, with everything a window may start from."""
    kept = Record()
    _run(pipe, Plan(), call, partial(_Recording, record=kept), denoiser)
    kept.guidance = getattr(pipe, "do_classifier_free_guidance", None)
    return kept


def local_errors(
    pipe: Any, call: Call, known: Record, steps: Steps, *, denoiser: str | None = None
) -> Errors:
    """E[start, size] of every window up to steps.degree, guessed by the predictor of `steps`.

    Stored damping is taken from steps.windows, a Listed, whose sizes are ignored. The error is
    that of the latents after the window, started from recorded latents; float64 mean of squares.
    Makes min(degree, N - 1) passes of N denoiser steps each.
    Raises UnsupportedPipeline for a pipeline that edits latents between steps, or whose call does
    not repeat.
    """
    errors: Errors = {}
    num_steps, degree = known.num_steps, steps.degree
    for offset in range(1, min(degree, num_steps - 1) + 1):
        sizes = search.fixed(num_steps, degree, offset, 0)
        option = Listed(sizes=sizes, damping=getattr(steps.windows, "damping", ()))
        plan = Plan(
            step=Steps(
                degree=degree,
                windows=option,
                predictor=steps.predictor,
                walk="replay",
                exact_split=False,
            )
        )
        _run(pipe, plan, call, partial(_Measuring, record=known, errors=errors), denoiser)
    return errors


def fitted_damping(records: Sequence[Record], degree: int) -> tuple[float, ...]:
    """Damping in [0, 1] of horizons 1 .. degree - 1: least squares over all recorded steps.

    b_h minimises the sum of |g_(n+h) - g_n - b_h (line through the last two - g_n)|^2.
    """
    along = [0.0] * degree
    square = [0.0] * degree
    for known in records:
        line = Extrapolation(1)
        for n, last in enumerate(known.guided):
            line.append(known.noise[n], last)
            base = last.double()
            ahead = known.noise[n + 1 : min(n + degree, known.num_steps)]
            for horizon, guess in enumerate(line.guesses(ahead), start=1):
                change = guess.double() - base
                actual = known.guided[n + horizon].double() - base
                along[horizon] += (change * actual).sum().item()
                square[horizon] += change.square().sum().item()
    fits = [a / s if s > 0 else 0.0 for a, s in zip(along[1:], square[1:], strict=True)]
    return tuple(min(max(fit, 0.0), 1.0) for fit in fits)


def fresh(call: Call) -> dict[str, Any]:
    """The call's arguments with generators in the state they have now, of their own."""
    return {name: _own(value) for name, value in call.items()}


class _Recording(StepRun):
    """Exact steps that are written down."""

    def __init__(self, *args: Any, record: Record, **kwargs: Any):
        self._record = record
        super().__init__(*args, **kwargs)

    def _begin(self) -> None:
        super()._begin()
        self._record.clear()

    def _exact(self, call: StepCall) -> Any:
        self._record.states.append(self.port.snapshot())
        self._record.random.append(self.randomness.snapshot())
        # Cloned: some schedulers write into what they are given.
        guided = call.guided.clone()
        result = super()._exact(call)
        self._record.guided.append(guided)
        self._record.results.append(result)
        return result

    def finish(self) -> Report:
        self._record.noise[:] = self.noise
        return super().finish()


class _Measuring(StepRun):
    """One rank that evaluates all positions of a window in turn."""

    def __init__(self, *args: Any, record: Record, errors: Errors, **kwargs: Any):
        self._measured = (record, errors)
        super().__init__(*args, **kwargs)

    def _replay(self) -> Walk:
        return _MeasuredWindows(self, *self._measured)

    @property
    def _evaluates(self) -> bool:
        return True

    def _exact(self, call: StepCall) -> Any:
        self._measured[0].check_repeats(self.position, call.guided)
        return super()._exact(call)

    def finish(self) -> Report:
        # The report gathers errors of ranks that play one position each: here is but one rank.
        self._refuse_open_window("the pipeline ended")
        return self.report


class _MeasuredWindows(Replay):
    """Windows that are compared with a record, prefix by prefix, and put back on it."""

    def __init__(self, run: StepRun, record: Record, errors: Errors):
        super().__init__(run)
        self._record = record
        self._found = errors

    def toward_own(self, call: StepCall, inside: int) -> Any:
        run = self.run
        return run.port.real(call.replaced(model_output=run.guesses()[inside]))

    def close(self) -> Any:
        run, window, result = self.run, self.run.window, None
        self._record.check_repeats(window.start, window.calls[0].guided)
        self.rewind()
        for inside, seen in enumerate(window.calls):
            call = run.handover.continued(seen, result) if inside else seen
            position = window.start + inside
            if self.carries:
                # This one rank walked the guesses itself: `seen` holds the latents it evaluated on.
                carried = self.carried(seen.guided, call.sample, seen.sample, position)
                call = call.replaced(model_output=carried)
            result = run.port.real(call)
            self._compare(window.start, inside + 1, sample_of(result))
        run.learn(self._record.guided[window.start : window.start + window.size])
        return self._back_on_record()

    def _compare(self, start: int, size: int, latents: Tensor) -> None:
        true = sample_of(self._record.results[start + size - 1])
        error = (latents.double() - true.double()).square().mean()
        self._found[start, size] = error.item() if size > 1 else 0.0

    def _back_on_record(self) -> Any:
        """The state after this window as the sequential run had it, and what its step returned."""
        position = self.run.position
        if position + 1 < self._record.num_steps:
            self.run.port.restore(self._record.states[position + 1])
            self.run.randomness.restore(self._record.random[position + 1])
        return self._record.results[position]


def _run(
    pipe: Any, plan: Plan, call: Call, run_type: Callable[..., StepRun], denoiser: str | None
) -> None:
    attachment = Attachment(pipe, plan, LocalWorld({}).mesh(0), denoiser=denoiser)
    attachment.run_type = run_type
    attachment.attach()
    try:
        with torch.no_grad():
            pipe(**fresh(call))
    except LatentsEdited as error:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} edits latents between steps, so it runs in the leader walk, "
            "where a window cannot start from recorded latents; use windows tail, which need no "
            f"calibration\n  seen: {error}"
        ) from None
    finally:
        attachment.detach()


def _own(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, (list, tuple)):
        return type(value)(_own(item) for item in value)
    return value
