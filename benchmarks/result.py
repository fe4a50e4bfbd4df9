"""Result files of benchmarks: format result/1, written whole after every row."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def begin(case: str, device: str, commit: str, **more: Any) -> dict[str, Any]:
    """A result without rows yet: what ran, on what, at which load."""
    return {
        "stretto": "result/1",
        "case": case,
        "basis": "measured",
        "device": device,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "load": load(),
        "rows": [],
        "summary": {},
        **more,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file as a whole: a run that is cut off leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps({**result, "load_after": load()}, indent=1) + "\n")
    aside.replace(path)


def versions() -> dict[str, str]:
    names = ("diffusers", "transformers", "numpy", "triton")
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in names:
        # Attention is measured where no diffusers is.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def load() -> float:
    return round(os.getloadavg()[0], 2)


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds of host time from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values, in the unit they came in."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "all": list(values),
    }
