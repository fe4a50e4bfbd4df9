"""The metrics of a run: a file of one JSON line per event, as it happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from pathlib import Path
from typing import Any

from stretto.errors import ConfigError
from stretto.train.events import Began, Event, line

log = logging.getLogger(__name__)

#: Its name in the folder of a run.
FILE = "metrics.jsonl"


def write(file: Path, event: Event, resumed: int) -> None:
    """Append an event; a run that begins anew sets an earlier file aside, a resumed one goes on
    in it after its step."""
    try:
        if isinstance(event, Began):
            file.parent.mkdir(parents=True, exist_ok=True)
            if resumed:
                kept = [row for row in read(file) if row["step"] <= resumed]
                file.write_text("".join(json.dumps(row) + "\n" for row in kept))
            elif file.exists():
                log.warning("metrics of an earlier run are now in %s", _set_aside(file))
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line(event)) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None


def _set_aside(file: Path) -> Path:
    """Give a file the first name with a number that is free: metrics-1.jsonl, metrics-2.jsonl."""
    names = (file.with_stem(f"{file.stem}-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    return file.rename(aside)


def read(file: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics file, [] where there is none; a cut last line is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for text in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(text))
    return rows
