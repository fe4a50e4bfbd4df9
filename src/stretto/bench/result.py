"""The document result/1 of a benchmark: where a figure comes from, its rows and its summary."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stretto.cluster import detect
from stretto.diffusion.output import write_result
from stretto.diffusion.provenance import load_now, provenance
from stretto.errors import ConfigError
from stretto.mesh.launch import OnNote

#: Hears what is under way: a stage and, where known, how many of how many.
Say = Callable[..., None]
#: Gets the whole document whenever more of it is known.
Keep = Callable[[dict[str, Any]], None]


def begin(case: str, device: str, **more: Any) -> dict[str, Any]:
    """A result without rows: what runs, on what, beside which load. Basis: measured.

    `complete` is false until `end`: a file with it was written on the way.
    """
    return {
        "stretto": "result/1",
        "case": case,
        "basis": "measured",
        "device": device,
        **provenance(),
        "load": {"before": load_now()},
        "complete": False,
        **more,
        "rows": [],
        "summary": {},
    }


def end(result: dict[str, Any]) -> None:
    """Record the load at the end; `busy`, whether half the cores were in the minute before."""
    result["load"]["after"] = load_now()
    result["complete"] = True
    result["busy"] = result["load"]["before"] > result["cores"] / 2


def write(file: Path, result: dict[str, Any]) -> None:
    """Write the file, or replace it as a whole; what is not finite becomes null."""
    aside = file.with_name(f".{file.name}-aside")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_result(aside, result)
        aside.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; give another --out") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def following(say: Say | None) -> OnNote | None:
    """Tells `say` what rank 0 notes; nothing to tell without `say`."""
    if say is None:
        return None

    def on_note(rank: int, note: dict[str, Any]) -> None:
        if rank == 0:
            say(note["stage"], note.get("done") or 0, note.get("total") or 0)

    return on_note


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes, in the unit the values have."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cpu_name() -> str:
    """The processor and its number of cores."""
    own = detect.cpu()
    return f"{own.name}, {own.count} cores"
