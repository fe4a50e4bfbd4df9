"""The exactness matrix as one table: every pipeline x scheduler case against itself, bit for bit.

A case is exact, refused with the reason, or wrong; there is no fourth. The checks are those of
`stretto.testing.exactness`, in one process with virtual ranks and once more on gloo processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stretto.bench import result as document
from stretto.bench.result import Say
from stretto.errors import ConfigError, StrettoError, UnsupportedPipeline
from stretto.plan.model import Plan
from stretto.plan.options import Steps
from stretto.search import windows
from stretto.testing import models
from stretto.testing.exactness import (
    DEGREES,
    Reference,
    counted,
    emulated,
    on_ranks,
    oracle_is_exact,
    reference,
)
from stretto.testing.models import Case
from stretto.testing.ranks import run_ranks

#: Guidance in cut batches: the same sums in other matrix shapes, float32 (design brief, O9).
CUT_ERROR = 1e-5
_RANKS_TIMEOUT_S = 900.0


@dataclass(kw_only=True)
class Row:
    """What was found of one case. None: not asked of this case, or not reached.

    `perfect`: per degree, whether perfect guesses reproduce the sequential bits. `ranks`, `cfg`:
    gloo processes bitwise the emulation. `cfg_error`: relative error of guidance over two ranks
    against the plain pipeline, 0 for equal bits. `evaluations`: counted forward passes per rank.
    `wrong`: every check that failed, in words.
    """

    case: str
    pipeline: str
    scheduler: str
    walk: str | None = None
    degree_one: bool | None = None
    restored: bool | None = None
    perfect: dict[int, bool] = field(default_factory=dict)
    ranks: bool | None = None
    evaluations: tuple[int, ...] = ()
    evaluations_as_planned: bool | None = None
    bytes_as_declared: bool | None = None
    cfg: bool | None = None
    cfg_error: float | None = None
    refused: str = ""
    wrong: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.wrong:
            return "wrong"
        return "refused" if self.refused else "exact"

    def check(self, holds: bool, what: str) -> bool:
        """`holds`, noted as wrong where it does not."""
        if not holds:
            self.wrong.append(what)
        return holds

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a result file."""
        return {
            "case": self.case,
            "verdict": self.verdict,
            "pipeline": self.pipeline,
            "scheduler": self.scheduler,
            "walk": self.walk,
            "degree 1": self.degree_one,
            "restored": self.restored,
            **{f"perfect p={p}": self.perfect.get(p) for p in DEGREES},
            "ranks = emulation": self.ranks,
            "evaluations": list(self.evaluations),
            "evaluations = plan": self.evaluations_as_planned,
            "bytes = declared": self.bytes_as_declared,
            "cfg ranks = emulation": self.cfg,
            "cfg error": self.cfg_error,
            "refused": self.refused,
            "wrong": "; ".join(self.wrong),
        }


def run(only: Sequence[str] = (), *, ranks: int = 3, say: Say | None = None) -> dict[str, Any]:
    """Examine the named cases (all by default); the document result/1.

    Starts `ranks` processes once for the step axis and two once for guidance. `say(stage, done,
    total)` follows progress. Summary: cases, exact, refused, wrong.
    Raises ConfigError for a name that is no case.
    """
    cases = chosen(only)
    say = say or (lambda stage, done, total: None)
    device = f"{ranks} gloo ranks of 1 thread and one process, {document.cpu_name()}"
    found = document.begin("exactness", device, ranks=ranks)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = examine(cases, ranks, say)
    finally:
        torch.set_num_threads(before)
    found["rows"] = [row.as_dict() for row in rows]
    verdicts = [row.verdict for row in rows]
    kinds = ("exact", "refused", "wrong")
    found["summary"] = {"cases": len(rows)} | {kind: verdicts.count(kind) for kind in kinds}
    document.end(found)
    return found


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases of these names, of the whole registry without. Raises ConfigError."""
    known = {**models.CASES, **models.OTHERS}
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ConfigError(f"no case {name!r} among {len(known)}{hint}")
    return [known[name] for name in dict.fromkeys(only or known)]


def examine(cases: Sequence[Case], ranks: int, say: Say) -> list[Row]:
    """A row per case: alone in this process first, then on ranks."""
    rows = []
    for index, case in enumerate(cases):
        say(case.name, index, len(cases))
        rows.append(_alone(case))
    standing = {
        row.case: (case, row)
        for case, row in zip(cases, rows, strict=True)
        if len(row.perfect) == len(DEGREES)
    }
    say(f"step axis on {ranks} gloo ranks", len(cases), len(cases))
    _on_step_ranks(standing, ranks)
    say("guidance on 2 gloo ranks", len(cases), len(cases))
    _on_cfg_ranks({name: (c, row) for name, (c, row) in standing.items() if c.guidance != "none"})
    return rows


def _alone(case: Case) -> Row:
    pipe = case.pipeline()
    row = Row(case=case.name, pipeline=type(pipe).__name__, scheduler=type(pipe.scheduler).__name__)
    try:
        known = reference(case)
        row.degree_one = row.check(known.degree_one, "degree 1 differs from the plain pipeline")
        row.restored = row.check(known.restored, "leaving did not restore the pipeline")
        for degree in DEGREES:
            exact = _oracle(case, known, degree)
            row.perfect[degree] = row.check(exact, f"perfect guesses differ at p = {degree}")
    except UnsupportedPipeline as error:
        row.refused = str(error)
    except StrettoError as error:
        # Loud, but no refusal: the table goes on and the exit code tells.
        row.check(False, f"{type(error).__name__}: {error}")
    return row


def _oracle(case: Case, known: Reference, degree: int) -> bool:
    known.pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    return oracle_is_exact(case, known, degree)


def _on_step_ranks(standing: dict[str, tuple[Case, Row]], ranks: int) -> None:
    plan = Plan(step=Steps(degree=ranks, exact_split=False))
    for case, row, outcomes in _outcomes(standing, plan):
        output, reports = emulated(case, plan)
        row.walk = outcomes[0]["walk"]
        equal = all(torch.equal(outcome["output"], output) for outcome in outcomes)
        row.ranks = row.check(equal, f"{ranks} gloo ranks differ from the emulation")
        row.evaluations = tuple(outcome["counted"] for outcome in outcomes)
        planned = planned_calls(case, outcomes[0]["sizes"], ranks)
        virtual = tuple(report.evaluations for report in reports)
        row.evaluations_as_planned = row.check(
            row.evaluations == virtual and row.evaluations == (planned or virtual),
            f"evaluations {row.evaluations} of {planned or virtual}",
        )
        if row.walk == "replay":
            equal = all(outcome["traffic"] == outcome["declared"] for outcome in outcomes)
            row.bytes_as_declared = row.check(equal, "bytes counted are not those declared")


def planned_calls(case: Case, sizes: Sequence[int], ranks: int) -> tuple[int, ...] | None:
    """Denoiser calls of each rank by arithmetic; None where steps take unequal numbers of calls.

    The calls of a step are counted on the plain pipeline, outside all hooks.
    """
    pipe = case.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with counted(pipe) as seen:
        case.call(pipe)
    each, rest = divmod(sum(seen.values()), sum(sizes))
    if rest or each != case.calls_per_step:
        return None
    return tuple(each * windows.calls(sizes, rank) for rank in range(ranks))


def _on_cfg_ranks(standing: dict[str, tuple[Case, Row]]) -> None:
    plan = Plan(cfg=2)
    for case, row, outcomes in _outcomes(standing, plan):
        output, reports = emulated(case, plan)
        equal = all(torch.equal(outcome["output"], output) for outcome in outcomes)
        row.cfg = row.check(equal, "guidance on 2 gloo ranks differs from the emulation")
        counts = [outcome["counted"] for outcome in outcomes]
        same = counts == [report.evaluations for report in reports]
        row.check(same, f"guidance on 2 ranks: evaluations {counts}")
        pipe = case.pipeline()
        pipe.set_progress_bar_config(disable=True)
        plain = case.call(pipe)
        row.cfg_error = ((output - plain).norm() / plain.norm()).item()
        # Whole calls are the same computation; cut batches may round otherwise.
        most = 0.0 if case.guidance == "calls" else CUT_ERROR
        row.check(row.cfg_error <= most, f"guidance on 2 ranks: relative error {row.cfg_error:.1e}")


def _outcomes(
    standing: dict[str, tuple[Case, Row]], plan: Plan
) -> Iterator[tuple[Case, Row, list[dict]]]:
    """(case, row, what each rank found) of all cases, from one start of ranks.

    A refusal is noted in the row, and the case left out.
    """
    if not standing:
        return
    found = run_ranks(on_ranks, plan.sizes, list(standing), plan, timeout_s=_RANKS_TIMEOUT_S)
    for name, (case, row) in standing.items():
        outcomes = [rank[name] for rank in found]
        reasons = [outcome["refused"] for outcome in outcomes if "refused" in outcome]
        if reasons:
            row.refused = f"{plan}: {reasons[0]}"
            row.check(len(reasons) == len(outcomes), "some ranks refused, others went on")
        else:
            yield case, row, outcomes
