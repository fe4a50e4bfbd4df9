"""The support table: every causal-LM family of the installed transformers on ranks and on one.

A family is equal (loss, logits and gradients), refused with the reason, or cannot be made here by
the library itself. Anything else is wrong or failed. One group of gloo ranks walks all families;
should one of them take the ranks down, the next group starts behind it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from stretto.bench import result as document
from stretto.bench.result import Keep, Say
from stretto.errors import ConfigError, LaunchError, RankLost
from stretto.plan.context import Context
from stretto.testing import families, support
from stretto.testing.ranks import run_ranks

VERDICTS = ("equal", "refused", "not built", "wrong", "failed")
#: Longest silence between two ranks of one family, and the longest walk.
_WAIT_S, _WALK_S = 120.0, 3600.0
_POLL_S = 2.0


@dataclass
class _Walk:
    """The report that rank 0 writes, a line when a family starts and one when it is judged."""

    report: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> str | None:
        """Take in what was judged; the family that was started last and not judged."""
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        entries = [json.loads(line) for line in lines]
        self.rows = [entry for entry in entries if entry["verdict"] != "started"]
        last = entries[-1] if entries else None
        return last["family"] if last and last["verdict"] == "started" else None

    def fail(self, family: str, reason: str) -> None:
        row = support.Verdict(family=family, verdict="failed", reason=reason)
        with self.report.open("a") as file:
            file.write(json.dumps(row.as_dict()) + "\n")


def run(
    only: Sequence[str] = (),
    *,
    ranks: int = 2,
    say: Say | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Examine the named families (all by default) on `ranks` gloo ranks; the document result/1.

    `say(stage, done, total)` follows progress; `keep(document)` gets what is known now and then.
    Summary: families, and how many of each verdict, and the largest errors of equal ones.
    Raises ConfigError for a name that is no family.
    """
    names = chosen(only)
    plan = Context(ring=ranks)
    device = f"{ranks} gloo ranks of 1 thread, {document.cpu_name()}"
    found = document.begin("families", device, ranks=ranks, plan=plan.short(), **_facts())
    with tempfile.TemporaryDirectory() as folder:
        walk = _Walk(Path(folder) / "report.jsonl")
        with _followed(walk, found, len(names), say, keep):
            _walk_all(walk, names, plan)
        walk.read()
        _fill(found, walk.rows)
    document.end(found)
    return found


def chosen(only: Sequence[str]) -> list[str]:
    """Families by name, all when none is named. Raises ConfigError, naming the nearest."""
    known = families.names()
    for name in only:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known))
            words = f"the nearest: {near}" if near else f"{len(known)} others are known"
            raise ConfigError(f"no causal-LM family is named {name!r}; {words}")
    return list(only) or known


def _walk_all(walk: _Walk, names: Sequence[str], plan: Context) -> None:
    pending = list(names)
    while pending:
        try:
            run_ranks(
                support.on_ranks,
                plan.sizes,
                pending,
                plan,
                str(walk.report),
                timeout_s=_WALK_S,
                mesh_timeout_s=_WAIT_S,
            )
        except (LaunchError, RankLost) as error:
            stopped = walk.read()
            if stopped is None:
                raise
            walk.fail(stopped, str(error).strip().splitlines()[0][:300])
        walk.read()
        done = {row["family"] for row in walk.rows}
        pending = [name for name in pending if name not in done]


@contextlib.contextmanager
def _followed(walk: _Walk, found, total: int, say, keep) -> Iterator[None]:
    """Tell how far the ranks are, and hand out what is known, until they are done."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_POLL_S):
            view = _Walk(walk.report)
            stopped = view.read()
            if say:
                say(f"families: {stopped or ''}", len(view.rows), total)
            if keep and view.rows:
                keep(_fill(dict(found), view.rows))

    thread = threading.Thread(target=follow, name="follow-families", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _fill(found: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    verdicts = [row["verdict"] for row in rows]
    equal = [row for row in rows if row["verdict"] == "equal"]
    errors = ("loss_error", "logits_error", "gradient_error")
    found["rows"] = rows
    found["summary"] = {
        "families": len(rows),
        **{verdict.replace(" ", "_"): verdicts.count(verdict) for verdict in VERDICTS},
        **{f"max_{name}": max((row[name] for row in equal), default=0.0) for name in errors},
    }
    return found


def _facts() -> dict[str, Any]:
    return {
        "library": f"transformers {metadata.version('transformers')}",
        "tokens": support.TOKENS,
        "tolerance": support.EQUAL,
    }
