"""Write the pages that are not written by hand.

    python docs/render.py            write docs/measured.md, docs/measured/, docs/reference/*.md
    python docs/render.py --check    exit 1 if a page differs from what would be written

Figures come only from benchmarks/results/*.json, losing rows included; the reference comes from
docstrings and from the command line itself.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cyclopts import App
from rendering import cells, targets
from rendering.sections import SECTIONS, kind_of
from rich.console import Console

import stretto

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"
BY_SCRIPT = "<!-- Written by docs/render.py: change the source, not this page. -->\n"


def main(arguments: list[str]) -> int:
    """Write all pages, or compare them with what is on disk."""
    stale = []
    made = pages()
    for name, text in made.items():
        path = DOCS / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text and "--check" in arguments:
            stale.append(name)
        elif old != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    # Pages of results that are gone.
    for path in sorted((DOCS / "measured").glob("*.md")):
        name = f"measured/{path.name}"
        if name not in made and "--check" in arguments:
            stale.append(name)
        elif name not in made:
            path.unlink()
            print(f"removed docs/{name}")
    for name in stale:
        print(f"docs/{name} is stale: run python docs/render.py", file=sys.stderr)
    return 1 if stale else 0


def pages() -> dict[str, str]:
    """Text of every generated page, by its path below docs."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {
        "measured.md": measured(found),
        **{f"measured/{name}.md": whole(name, result) for name, result in found.items()},
        "reference/python.md": python_reference(),
        "reference/commands.md": command_reference(),
    }


def measured(results: dict[str, dict]) -> str:
    """Every target on one line, then a section per result; without any, the page says so."""
    parts = [BY_SCRIPT, "# Measured\n"]
    if not results:
        parts.append("No result is recorded yet: `benchmarks/results/` is empty.\n")
        return "\n".join(parts)
    parts += [HEAD, *targets_table(results)]
    for kind in SECTIONS:
        for name, result in results.items():
            if kind_of(result["case"]) == kind:
                parts += section(name, result)
    return "\n".join(parts)


HEAD = """\
Rendered from `benchmarks/results/*.json`; how each is made stands in
[benchmarks](../benchmarks/README.md). Ratios above 1 are gains; **bold** is a loss or a target not
met. Several values are given as median (least to most, count). Slices share one GPU, emulated links
one machine: such results hold for ratios within a run. Targets were set before measuring; a dash is
a figure without one.
"""


def targets_table(results: dict[str, dict]) -> list[str]:
    """A line per target and result."""
    rows = [
        (what, wanted, found, "" if met is None else cells.cell(met), result_link(name))
        for what, wanted, found, met, name in targets.lines(
            {name: each for name, each in results.items() if each.get("complete") is not False}
        )
    ]
    return cells.table(("what", "wanted", "found", "met", "result"), rows)


def result_link(name: str) -> str:
    return f"[{name}](measured/{name}.md)"


def section(name: str, result: dict) -> list[str]:
    """Where a result comes from, and what it says in short; all figures of one that was cut off."""
    write = SECTIONS[kind_of(result["case"])]
    lines = [f"## {result['case']}: {result_link(name)}\n", *cells.facts(result), ""]
    if result.get("complete") is False:
        write, lines = cells.figures, [*lines, "**Cut off: the rows so far.**", ""]
    return [*lines, *write(result)]


def whole(name: str, result: dict) -> str:
    """The page of a result: all figures, all rows, all notes."""
    parts = [
        BY_SCRIPT,
        f"# {name}\n",
        f"{result['case']}, in short on [measured](../measured.md).\n",
    ]
    parts += [*cells.facts(result), ""]
    parts += [f"- {note}" for note in result.get("notes", [])]
    parts += ["", *cells.figures(result), *cells.all_rows(result.get("rows", []))]
    return "\n".join(parts)


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
    """What `stretto WORDS --help` prints in a terminal of 100 columns, without trailing blanks."""
    from stretto.cli.app import build

    out = io.StringIO()
    build().help_print(words, console=Console(file=out, width=100))
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
