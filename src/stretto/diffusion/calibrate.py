"""Make a calibration: measure local errors, plan windows from them, verify, keep the best.

No error model always wins, so every candidate is run end to end, by emulation, on calls that were
not used for planning: plans from the noise grid alone, from errors with repeated predictions and
from errors with damped ones, each with repeated, stored-damping and online-damped predictions.
Source: design brief of step parallelism, section 4.5.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.diffusion.adapters import denoisers_of
from stretto.diffusion.api import emulate
from stretto.diffusion.calibration import Calibration, Entry, Evidence, fingerprint
from stretto.diffusion.local_errors import (
    Call,
    Errors,
    Record,
    fitted_damping,
    fresh,
    local_errors,
    record,
)
from stretto.diffusion.quality import psnr
from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Parastep, Steps, Windows
from stretto.search import windows as search

Say = Callable[[str], None]

#: Candidates that half of the held-out calls leave for the others; all would cost a third more.
_NUM_FINALISTS = 3


def calibrate(
    pipe: Any,
    calls: Sequence[Call],
    *,
    degree: int,
    depths: Sequence[int] | None = None,
    holdout: Sequence[Call],
    denoiser: str | None = None,
    say: Say | None = None,
) -> Calibration:
    """Window plans for `degree` step ranks, made on `calls` and chosen on `holdout`.

    A call is the keyword arguments of one pipeline call; generators are seeded explicitly, and no
    call of `holdout` should repeat one of `calls`. `depths` default to that of `Parastep()` and
    its two neighbours. PSNR is over the pipeline's output as the calls ask for it, range 1 for
    pictures in [0, 1]. Costs about 1 + 2 degree sequential runs per call; per depth about 11 on the
    first half of the held-out calls and 6 on the others. `say` is told what is under way.
    Raises PlanMismatch for a degree or depth that does not fit, ConfigError for calls of unequal
    steps, UnsupportedPipeline for pipelines in the leader walk and calls that do not repeat.
    """
    wanted = {degree: depths}
    options = {"holdout": holdout, "denoiser": denoiser, "say": say}
    return calibrations(pipe, calls, depths=wanted, **options)[degree]


def calibrations(
    pipe: Any,
    calls: Sequence[Call],
    *,
    depths: Mapping[int, Sequence[int] | None],
    holdout: Sequence[Call],
    denoiser: str | None = None,
    say: Say | None = None,
) -> dict[int, Calibration]:
    """A calibration for every degree in `depths`, each as `calibrate` makes it, for less.

    Windows of the largest degree hold those of the smaller ones, so errors are measured once.
    Raises as `calibrate` does.
    """
    say = say or (lambda text: None)
    _check_request(calls, holdout, min(depths))
    say(f"recording {len(calls)} sequential call(s)")
    records = [record(pipe, call, denoiser=denoiser) for call in calls]
    noise = _common_grid(records)
    chosen = {p: _checked_depths(wanted, len(noise) - 1, p) for p, wanted in depths.items()}
    planner = _measure(pipe, calls, records, max(depths), denoiser, say)
    bench = _Bench.of(pipe, holdout, max(depths), denoiser)
    frontiers = {p: _frontier(planner.at(p), bench.at(p), chosen[p], say) for p in chosen}
    say("measuring the noise floor")
    evidence = _evidence(pipe, calls, bench, records[0], denoiser)
    return {
        degree: Calibration(
            subject=fingerprint(pipe, denoiser=denoiser),
            degree=degree,
            steps=len(noise) - 1,
            noise=noise,
            damping=planner.at(degree).damping,
            frontier=frontier,
            evidence=evidence,
        )
        for degree, frontier in frontiers.items()
    }


@dataclass(frozen=True)
class Candidate:
    """A plan to try, and what the error model says of it (None: it has no opinion)."""

    windows: tuple[int, ...]
    predictor: str
    damping: tuple[float, ...]
    predicted: float


@dataclass(frozen=True)
class _Planner:
    """What was measured on the calibration calls: mean local errors for two kinds of guess."""

    noise: tuple[float, ...]
    degree: int
    damping: tuple[float, ...]
    repeat: Errors
    damped: Errors

    def at(self, degree: int) -> _Planner:
        """The planner of a smaller degree: its windows and horizons are among the measured."""
        return replace(self, degree=degree, damping=self.damping[: degree - 1])

    def candidates(self, depth: int) -> list[Candidate]:
        """Every window plan with every way to guess, each once; the analytic plan comes first."""
        plans = [search.tail(self.noise, self.degree, depth)]
        plans += [self._plan(errors, depth) for errors in (self.damped, self.repeat)]
        ways = (("damped", (), self.damped), ("damped", self.damping, self.damped))
        return [
            Candidate(windows, predictor, damping, _summed(errors, windows))
            for windows in dict.fromkeys(plans)
            for predictor, damping, errors in (*ways, ("repeat", (), self.repeat))
        ]

    def _plan(self, errors: Errors, depth: int) -> tuple[int, ...]:
        def cost(start: int, size: int) -> float:
            return errors[start, size] * search.distrust(start, size)

        return search.best(len(self.noise) - 1, self.degree, depth, cost)


def _measure(
    pipe: Any,
    calls: Sequence[Call],
    records: Sequence[Record],
    degree: int,
    denoiser: str | None,
    say: Say,
) -> _Planner:
    damping = fitted_damping(records, degree)
    found: dict[str, Errors] = {}
    sizes = (1,) * records[0].num_steps
    for name, stored in (("repeat", ()), ("damped", damping)):
        steps = Steps(degree=degree, predictor=name, windows=Listed(sizes=sizes, damping=stored))
        tables = []
        for index, (call, known) in enumerate(zip(calls, records, strict=True), start=1):
            say(f"measuring windows with {name} predictions, call {index} of {len(calls)}")
            tables.append(local_errors(pipe, call, known, steps, denoiser=denoiser))
        found[name] = {
            key: fmean(table[key] for table in tables) if key[1] > 1 else 0.0
            for key in _all_windows(records[0].num_steps, degree)
        }
    return _Planner(tuple(records[0].noise), degree, damping, found["repeat"], found["damped"])


@dataclass
class _Bench:
    """Held-out calls with their sequential results, and how close a plan comes to them.

    `kept`: results of the first calls under a plan, so that finalists are not run twice on them.
    """

    pipe: Any
    calls: Sequence[Call]
    degree: int
    denoiser: str | None
    references: list[Tensor]
    data_range: float
    kept: dict[Plan, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Any, calls: Sequence[Call], degree: int, denoiser: str | None) -> _Bench:
        results = [tensor_of(pipe(**fresh(call))) for call in calls]
        low = min(result.min().item() for result in results)
        high = max(result.max().item() for result in results)
        data_range = 1.0 if low >= 0.0 and high <= 1.0 else high - low
        return cls(pipe, calls, degree, denoiser, results, data_range)

    def at(self, degree: int) -> _Bench:
        """The same calls and references for another degree."""
        return replace(self, degree=degree, kept={})

    def psnr_db(
        self, windows: Windows, predictor: str = "damped", num_calls: int | None = None
    ) -> float:
        """Average PSNR of the items of the first `num_calls` held-out calls; inf where equal."""
        plan = Plan(step=Steps(degree=self.degree, windows=windows, predictor=predictor))
        kept = self.kept.setdefault(plan, [])
        calls, references = self.calls[:num_calls], self.references[:num_calls]
        with emulate(self.pipe, plan, denoiser=self.denoiser, reuse=True):
            kept += [tensor_of(self.pipe(**fresh(call))) for call in calls[len(kept) :]]
        joined = torch.cat(kept[: len(calls)]), torch.cat(references)
        return psnr(*joined, data_range=self.data_range).average

    def candidate_db(self, candidate: Candidate, num_calls: int | None = None) -> float:
        option = Listed(sizes=candidate.windows, damping=candidate.damping)
        return self.psnr_db(option, candidate.predictor, num_calls)


def _frontier(
    planner: _Planner, bench: _Bench, depths: Sequence[int], say: Say
) -> tuple[Entry, ...]:
    entries = []
    for depth in depths:
        say(f"verifying depth {depth} on {len(bench.calls)} held-out call(s)")
        entries.append(_best_entry(planner, bench, depth))
    return tuple(entries)


def _best_entry(planner: _Planner, bench: _Bench, depth: int) -> Entry:
    analytic, *others = planner.candidates(depth)
    tail_db = bench.candidate_db(analytic)
    best, verified_db = analytic, tail_db
    for finalist in _finalists(bench, others):
        reached = bench.candidate_db(finalist)
        if reached > verified_db:
            best, verified_db = finalist, reached
    bench.kept.clear()
    warmup = _warmup_for(depth, len(planner.noise) - 1, planner.degree)
    return Entry(
        depth=depth,
        windows=best.windows,
        predictor=best.predictor,
        damping=best.damping,
        predicted=best.predicted,
        verified_db=verified_db,
        tail_db=tail_db,
        parastep_db=bench.psnr_db(Parastep(warmup=warmup)),
    )


def _finalists(bench: _Bench, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those to run on every held-out call: the best on the first half of them."""
    half = (len(bench.calls) + 1) // 2
    ranked = sorted(candidates, key=lambda c: bench.candidate_db(c, half), reverse=True)
    return ranked[:_NUM_FINALISTS]


def _evidence(
    pipe: Any, calls: Sequence[Call], bench: _Bench, known: Record, denoiser: str | None
) -> Evidence:
    parameter = next(next(iter(denoisers_of(pipe, denoiser).values())).parameters())
    # Exact steps, their batch cut over ranks where it can be: the same sums in another order.
    exact = Listed(sizes=(1,) * known.num_steps)
    return Evidence(
        calls=tuple(_described(call) for call in calls),
        holdout=tuple(_described(call) for call in bench.calls),
        guidance=known.guidance,
        data_range=bench.data_range,
        floor_db=bench.psnr_db(exact),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions={name: metadata.version(name) for name in ("stretto", "torch", "diffusers")},
    )


def tensor_of(output: Any) -> Tensor:
    """A pipeline's first output as one tensor, dim 0 the items; pictures in [0, 1].

    Takes tensors, arrays, PIL pictures, and lists of these (videos: lists of frames).
    """
    return torch.from_numpy(_array(output[0]))


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64).numpy()
    if isinstance(value, (list, tuple)):
        return np.stack([_array(item) for item in value])
    array = np.asarray(value)
    return array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def _described(call: Call) -> dict[str, Any]:
    """A call as plain data: seeds of generators, shapes of tensors, everything else as it is."""
    return {name: _plain(value) for name, value in call.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Generator):
        return {"seed": value.initial_seed()}
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return type(value).__name__


def _all_windows(num_steps: int, degree: int) -> list[tuple[int, int]]:
    """(start, size) of every window a plan may hold after its first step."""
    return [
        (start, size)
        for start in range(1, num_steps)
        for size in range(1, min(degree, num_steps - start) + 1)
    ]


def _summed(errors: Errors, windows: Sequence[int]) -> float:
    starts = np.cumsum([0, *windows[:-1]])
    pairs = zip(starts.tolist(), windows, strict=True)
    return float(sum(errors[start, size] for start, size in pairs if start))


def _warmup_for(depth: int, num_steps: int, degree: int) -> int | None:
    """Warmup of the published schedule at a depth: its own where that fits, else the least."""
    if depth == search.default_depth(num_steps, degree):
        return None
    warmups = range(1, num_steps + 1)
    return next(w for w in warmups if len(search.published(num_steps, degree, w)) == depth)


def _check_request(calls: Sequence[Call], holdout: Sequence[Call], degree: int) -> None:
    if degree < 2:
        raise PlanMismatch(
            f"step={degree}: there is nothing to calibrate on one rank, every step is exact; "
            "use a degree of at least 2"
        )
    if not calls or not holdout:
        raise ConfigError(
            f"{len(calls)} call(s) to measure and {len(holdout)} held-out call(s): at least one "
            "of each is needed, because a plan is verified on calls it was not made from"
        )


def _common_grid(records: Sequence[Record]) -> tuple[float, ...]:
    grids = {tuple(known.noise) for known in records}
    if len(grids) > 1:
        steps = ", ".join(str(known.num_steps) for known in records)
        raise ConfigError(
            f"the calls walk {len(grids)} different noise grids (steps: {steps}); calibrate one "
            "grid at a time, with equal steps, strength and scheduler settings in every call"
        )
    return grids.pop()


def _checked_depths(depths: Sequence[int] | None, num_steps: int, degree: int) -> list[int]:
    """Depths in order; refused before anything expensive is measured."""
    least = search.least_depth(num_steps, degree)
    if depths is None:
        usual = search.default_depth(num_steps, degree)
        depths = [d for d in (usual - 1, usual, usual + 1) if least <= d <= num_steps]
    wrong = [d for d in depths if not least <= d <= num_steps]
    if wrong or not depths:
        raise PlanMismatch(
            f"depth {wrong or 'list is empty'}: {num_steps} steps on {degree} step ranks take "
            f"between {least} and {num_steps} sequential evaluations\n"
            f"  to fix: depths {least}..{num_steps}"
        )
    return sorted(set(depths))
