"""Write the pages that are not written by hand.

    python docs/render.py            write docs/measured.md and docs/reference/*.md
    python docs/render.py --check    exit 1 if a page differs from what would be written

Figures come only from benchmarks/results/*.json, losing rows included; the reference comes from
docstrings and from the command line itself.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cyclopts import App

import stretto

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"
BY_SCRIPT = "<!-- Written by docs/render.py: change the source, not this page. -->\n"


def main(arguments: list[str]) -> int:
    """Write all pages, or compare them with what is on disk."""
    os.environ["COLUMNS"] = "100"  # before the command line is asked for its help
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text and "--check" in arguments:
            stale.append(name)
        elif old != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    for name in stale:
        print(f"docs/{name} is stale: run python docs/render.py", file=sys.stderr)
    return 1 if stale else 0


def pages() -> dict[str, str]:
    """Text of every generated page, by its path below docs."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return {
        "measured.md": measured(results),
        "reference/python.md": python_reference(),
        "reference/commands.md": command_reference(),
    }


def measured(results: list[dict]) -> str:
    """One section per result document; without any, the page says so."""
    parts = [BY_SCRIPT, "# Measured\n"]
    if not results:
        parts.append("No result is recorded yet: `benchmarks/results/` is empty.\n")
    for result in results:
        parts += section(result)
    return "\n".join(parts)


def section(result: dict) -> list[str]:
    """Where a result comes from, its summary and all its rows."""
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    facts = {
        "basis": result["basis"],
        "device": result["device"],
        "command": f"`{result['command']}`",
        "commit": result["commit"],
        "versions": versions,
        "load": result.get("load", ""),
    }
    lines = [f"## {result['case']}\n"]
    lines += [f"- {name}: {cell(value)}" for name, value in facts.items() if value != ""]
    summary = [{"summary": k, "value": v} for k, v in result.get("summary", {}).items()]
    return [*lines, "", *table(summary), *table(result.get("rows", []))]


def table(rows: list[dict]) -> list[str]:
    """A Markdown table whose columns are all keys that occur, in order of appearance."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row.get(key, "")) for key in columns) + " |" for row in rows]
    return [*lines, ""]


def cell(value: object) -> str:
    """A number to 4 digits; several as median, range and count."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        middle, low, high = statistics.median(value), min(value), max(value)
        return f"{cell(middle)} ({cell(low)} to {cell(high)}, n = {len(value)})"
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def python_reference() -> str:
    """Signature, docstring and public methods of every public name."""
    parts = [BY_SCRIPT, "# Python reference\n", "Everything in `stretto.__all__`.\n"]
    for name in stretto.__all__:
        value = getattr(stretto, name)
        signature = "" if inspect.ismodule(value) else f"```\n{name}{parameters(value)}\n```\n"
        parts += [f"## stretto.{name}\n", signature, f"{inspect.getdoc(value)}\n"]
        parts += members(value)
    return "\n".join(part for part in parts if part)


def parameters(value: Callable) -> str:
    """Parameters with types and plain defaults, as the source writes them.

    `inspect.signature` alone would show the addresses of validators and differ between runs.
    """
    written = getattr(value, "__annotations__", {})
    lines, star = [], False
    for name, parameter in inspect.signature(value).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("    *")
            star = True
        kind = str(written.get(name, parameter.annotation))
        kind = "" if "empty" in kind else re.sub(r"^Annotated\[(\w+),.*\]$", r"\1", kind)
        lines.append(f"    {name}: {kind}{default_of(parameter)}")
    return "(\n" + ",\n".join(lines) + "\n)" if lines else "()"


def default_of(parameter: inspect.Parameter) -> str:
    """` = value` where the value is short and the same in every run, else ` = ...`."""
    default = parameter.default
    if default is parameter.empty:
        return ""
    plain = isinstance(default, str | int | float | bool) or default is None
    return f" = {default!r}" if plain else " = ..."


def members(value: object) -> list[str]:
    """First docstring line of the classes of a module, or of the methods of a class."""
    found = {n: v for n, v in vars(value).items() if not n.startswith("_") and first_line(v)}
    if inspect.ismodule(value):
        home = value.__name__
        found = {n: v for n, v in found.items() if getattr(v, "__module__", "") == home}
    else:
        found = {n: v for n, v in found.items() if inspect.isfunction(v)}
    lines = [f"- `{name}`: {first_line(member)}" for name, member in found.items()]
    return ["\n".join(lines) + "\n"] if lines else []


def first_line(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


def command_reference() -> str:
    """The help text of `stretto` and of each command, those below another command too."""
    from stretto.cli.app import build

    parts = [BY_SCRIPT, "# Commands\n"]
    for words in ([], *below(build(), [])):
        title = " ".join(["stretto", *words])
        parts.append(f"## {title}\n\n```\n{help_of(words)}\n```\n")
    return "\n".join(parts)


def below(app: App, words: list[str]) -> Iterator[list[str]]:
    """The words of every command under `app`, in the order of the table."""
    for name in app:
        if not name.startswith("-"):
            yield [*words, name]
            yield from below(app[name], [*words, name])


def help_of(words: list[str]) -> str:
    """What `stretto WORDS --help` prints, without trailing blanks."""
    from stretto.cli.app import main as command

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command([*words, "--help"]) == 0
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
