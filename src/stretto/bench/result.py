"""The document result/1 of a benchmark: where a figure comes from, its rows and its summary."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import stretto
from stretto.cluster import detect
from stretto.diffusion.output import write_result
from stretto.errors import ConfigError


def begin(case: str, device: str, **more: Any) -> dict[str, Any]:
    """A result without rows: what runs, on what, beside which load. Basis: measured."""
    return {
        "stretto": "result/1",
        "case": case,
        "basis": "measured",
        "device": device,
        "command": shlex.join(["stretto", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%d"),
        "cores": detect.usable_cores(),
        "load": {"before": load()},
        **more,
        "rows": [],
        "summary": {},
    }


def end(result: dict[str, Any]) -> None:
    """Record the load at the end, and whether other work kept the cores busy at the start."""
    result["load"]["after"] = load()
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


def check_writable(file: Path) -> None:
    """Raise ConfigError before minutes of measuring, not after."""
    parent = next(p for p in file.absolute().parents if p.exists())
    if file.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"cannot write {file}: give --out a file in a folder of yours")


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes, in the unit the values have."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cpu_name() -> str:
    """The processor and its number of cores."""
    own = detect.cpu()
    return f"{own.name}, {own.count} cores"


def _commit() -> str | None:
    """The commit of the tree this package is run from, None for an installed one."""
    asked = ["git", "-C", str(Path(stretto.__file__).parent), "log", "-1", "--format=%h", "--", "."]
    with contextlib.suppress(OSError):
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return None


def _versions() -> dict[str, str]:
    found = {"stretto": stretto.__version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
