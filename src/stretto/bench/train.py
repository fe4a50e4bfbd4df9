"""`bench train`: ranks train as one does, a lost rank is named and resumed, two are faster."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stretto.bench import result as document
from stretto.bench import train_runs, train_speed
from stretto.bench.result import Keep, Say
from stretto.train.recipe import Recipe

_NOTES = (
    "losses: largest relative difference from one rank on the same samples, float64, of any step; "
    "norm: the same of the gradient norm, which shows a wrong factor that AdamW would hide",
    "lost rank: rank 1 is killed by the system after a step; seconds from its death to the error; "
    "bitwise: the losses of the resumed run equal those of one that nobody disturbed",
    "speed: median of one rank of one thread over the median of the row, steps interleaved",
    "ceiling: two independent runs at once, which is what this machine leaves two processes",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run: rank counts and steps of the comparison, steps around the kill, the race."""

    ranks: tuple[int, ...] = (1, 2, 4)
    steps: int = 6
    killed_steps: int = 6
    race: Recipe = field(default_factory=lambda: Recipe(tokens=4096, sequences=2))
    rounds: int = 8


FULL = Size()
QUICK = Size(
    ranks=(1, 2),
    steps=2,
    killed_steps=4,
    race=Recipe(tokens=128, sequences=2),
    rounds=1,
)


def run(size: Size, *, say: Say | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """The document result/1: rows of three parts and the summary. `keep` gets it on the way."""
    on_note, keep = document.following(say), keep or (lambda _: None)
    device = f"up to {max(size.ranks)} ranks of 1 thread, {document.cpu_name()}"
    found = document.begin("train", device, notes=list(_NOTES))
    # The timed part first: the others heat the machine, and its load is that of the start.
    timed = train_speed.rows(size.race, size.rounds, on_note)
    found["rows"] += timed
    found["summary"] |= train_speed.summary(timed)
    keep(found)
    with tempfile.TemporaryDirectory(prefix="stretto-bench-") as folder:
        lost = train_runs.lost_rank(Path(folder), size.killed_steps, on_note)
    found["rows"].append(lost)
    found["summary"] |= _lost_summary(lost)
    keep(found)
    exact = train_runs.exact_rows(train_runs.cases(size.steps, size.ranks), on_note)
    found["rows"] += exact
    found["summary"] |= _exact_summary(exact)
    document.end(found)
    return found


def _lost_summary(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "killed_rank_named": row["named"],
        "killed_rank_seconds": row["seconds_to_error"],
        "resume_bitwise": row["bitwise"],
    }


def _exact_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shared = [row for row in rows if row["ranks"] > 1]
    return {
        "plans": len(shared),
        "max_loss_difference_fp64": max(row["loss_difference"] for row in shared),
        "max_norm_difference_fp64": max(row["norm_difference"] for row in shared),
        "losses_within_1e_9": all(row["within_tolerance"] for row in shared),
    }


def is_right(summary: dict[str, Any]) -> bool:
    """Whether all is as it must be but the speed, which depends on who else uses the cores."""
    names = ("losses_within_1e_9", "killed_rank_named", "resume_bitwise")
    return all(summary[name] for name in names)
