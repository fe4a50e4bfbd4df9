"""Where a figure comes from: the command, the code, the machine and how busy it was."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import stretto
from stretto.cluster import detect


def provenance() -> dict[str, Any]:
    """What every result document says of its origin; its load is measured around the work."""
    return {
        "command": shlex.join(["stretto", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "cores": detect.usable_cores(),
    }


def commit() -> str | None:
    """The commit of the tree this package is run from, None for an installed one."""
    asked = ["git", "-C", str(Path(stretto.__file__).parent), "log", "-1", "--format=%h", "--", "."]
    with contextlib.suppress(OSError):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the libraries that do the work."""
    found = {"stretto": stretto.__version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def load_now() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 2)
