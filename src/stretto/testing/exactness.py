"""Is step parallelism exact where it must be? One pipeline against itself, bit for bit.

degree 1: hooks on, one rank, bitwise the plain pipeline. Oracle: guesses replaced by the recorded
true predictions, bitwise sequential, which isolates plumbing, random state, dtypes and scheduler
history from the quality of guesses. Ranks: real gloo processes, bitwise the emulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.adapters import denoisers_of
from stretto.diffusion.api import emulate, parallelized
from stretto.diffusion.report import Report
from stretto.errors import UnsupportedPipeline
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Steps, StepsCase
from stretto.plan.traffic import Traffic
from stretto.testing.models import Case

DEGREES = (2, 3, 4)


class Recorder:
    """A predictor that only listens: it keeps every true prediction."""

    needs_own_output = False

    def __init__(self) -> None:
        self.guided: list[Tensor] = []

    def reset(self) -> None:
        self.guided.clear()

    def append(self, s: float, g: Tensor) -> None:
        self.guided.append(g.clone())

    def close_window(self, start: int, size: int) -> None:
        """Nothing to fit."""

    def guesses(self, noise: Sequence[float]) -> Sequence[Tensor]:
        raise AssertionError("a run of degree 1 never guesses")


class Oracle(Recorder):
    """A predictor that is never wrong: it reads the record of a sequential run."""

    def __init__(self, record: Sequence[Tensor]):
        super().__init__()
        self.record = record

    def guesses(self, noise: Sequence[float]) -> Sequence[Tensor]:
        known = len(self.guided)
        return [g.clone() for g in self.record[known : known + len(noise)]]


@dataclass
class Reference:
    """The plain pipeline's output, and the same under a plan of one rank."""

    pipe: object
    output: Tensor
    guided: list[Tensor] = field(default_factory=list)
    degree_one: bool = False
    restored: bool = False


def reference(case: Case) -> Reference:
    """Run the plain pipeline, then under degree 1 (twice), then plain again."""
    pipe = case.pipeline()
    plain = case.call(pipe)
    recorder = Recorder()
    with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0), predictor=recorder) as attached:
        first, second = case.call(pipe), case.call(pipe)
    assert attached.report is not None
    found = Reference(pipe, plain, list(recorder.guided))
    found.degree_one = torch.equal(first, plain) and torch.equal(second, plain)
    found.restored = torch.equal(case.call(pipe), plain)
    return found


def oracle_is_exact(case: Case, known: Reference, degree: int) -> bool:
    """Whether windows with perfect guesses reproduce the sequential output bit for bit."""
    plan = Plan(step=Steps(degree=degree, exact_split=False))
    oracles = [Oracle(known.guided) for _ in range(degree)]
    with emulate(known.pipe, plan, predictors=oracles) as run:
        case.call(known.pipe)
    return all(torch.equal(case.tensor(result), known.output) for result in run.results)


@contextmanager
def counted(pipe: object) -> Iterator[Counter]:
    """Real forward passes per denoiser while the context lasts, seen from outside the hooks."""
    counts: Counter[str] = Counter()
    modules = denoisers_of(pipe)
    handles = []
    for name, module in modules.items():
        # The innermost layer sees exactly the calls that were truly made.
        inner = next(m for m in module.modules() if not list(m.children()))
        handles.append(inner.register_forward_pre_hook(lambda *_, n=name: counts.update([n])))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def declared(report: Report, rank: int, *, raw_bytes: int = 0, chunks: int = 1) -> Traffic:
    """The bytes that the plan's step option declares for what a report says was done."""
    return report.plan.step.wire(
        StepsCase(report.sizes, rank, report.guided_bytes, raw_bytes, chunks)
    )


def emulated(case: Case, plan: Plan) -> tuple[Tensor, list[Report]]:
    """The second call under emulation, as `on_ranks` returns it, and the report of every rank."""
    pipe = case.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with emulate(pipe, plan) as run:
        case.call(pipe)
        return case.call(pipe), list(run.reports)


def on_ranks(mesh, names: Sequence[str], plan: Plan) -> dict[str, dict]:
    """Body for run_ranks: each named case under the plan; outputs and what was counted.

    `counted`: forward passes of the second call, seen from outside the hooks. A case that the
    library does not support has only `refused`, the reason.
    """
    from stretto.testing import models

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        case = models.CASES.get(name) or models.OTHERS[name]
        pipe = case.pipeline()
        pipe.set_progress_bar_config(disable=True)
        try:
            with parallelized(pipe, plan, mesh=mesh, debug=True) as attached:
                case.call(pipe)
                with counted(pipe) as seen:
                    output = case.call(pipe)
        except UnsupportedPipeline as error:
            # Every rank refuses alike, before it waits for another.
            found[name] = {"refused": str(error)}
            continue
        report = attached.report
        assert report is not None
        found[name] = {
            "output": output,
            "counted": sum(seen.values()),
            "evaluations": report.evaluations,
            "structure_calls": report.structure_calls,
            "sizes": report.sizes,
            "traffic": report.traffic,
            "declared": declared(report, mesh.rank("step")),
            "walk": report.walk,
        }
    return found
