"""Numbers, rows and facts as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

#: Whole numbers of a list that is written out; more are given as median and range.
_WRITTEN_OUT = 16


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table and an empty line; nothing without rows."""
    lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    if not lines:
        return []
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *lines, ""]


def cell(value: object) -> str:
    """A number to 4 digits; several as median, range and count."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "**no**", None: "-"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return _of_dict(value)
    if isinstance(value, list):
        return _of_list(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _of_dict(value: dict[str, Any]) -> str:
    if {"median", "low", "high"} <= value.keys():
        count = f", n = {len(value['all'])}" if "all" in value else ""
        return f"{cell(value['median'])} ({cell(value['low'])} to {cell(value['high'])}{count})"
    return ", ".join(f"{key} {cell(item)}" for key, item in value.items())


def _of_list(value: list) -> str:
    numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
    if not value or len(numbers) < len(value):
        return ", ".join(cell(item) for item in value)
    if all(isinstance(v, int) for v in value) and len(value) <= _WRITTEN_OUT:
        return " ".join(map(str, value))
    return spread(value)


def spread(values: Sequence[float]) -> str:
    """Median, extremes and count of the same thing measured several times."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{cell(values[0])} (n = 1)"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{cell(middle)} ({cell(low)} to {cell(high)}, n = {len(values)})"


def times(value: float | None) -> str:
    """A ratio; in bold where it is a loss."""
    if value is None:
        return "-"
    return f"{value:.2f}x" if value >= 1 else f"**{value:.2f}x**"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:+.{digits}f} %"


def gigabytes(num_bytes: float | None) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "-"


def facts(result: dict[str, Any]) -> list[str]:
    """What a figure means nothing without: basis, device, ranks, load, commit, command."""
    load = result.get("load")
    if isinstance(load, dict):
        load = f"{load['before']:.1f} before, {load['after']:.1f} after"
    elif "load_after" in result:
        load = f"{load:.1f} before, {result['load_after']:.1f} after"
    parts = {
        "basis": result.get("summary", {}).get("basis", result["basis"]),
        "device": result["device"],
        "ranks": result.get("ranks"),
        "date": result.get("date"),
        "commit": result["commit"],
        "load": f"{load}, **busy: do not quote the times**" if result.get("busy") else load,
        "versions": ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items()),
        "command": f"`{result['command']}`",
    }
    return [f"- {name}: {cell(value)}" for name, value in parts.items() if value not in (None, "")]


def figures(result: dict[str, Any]) -> list[str]:
    """The whole summary of a result, a line per figure."""
    return table(("figure", "value"), result.get("summary", {}).items())


def all_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """All rows, a table for every run of rows that have the same keys."""
    lines: list[str] = []
    for columns, same in groupby(rows, key=tuple):
        lines += table(columns, (row.values() for row in same))
    return lines


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """Lines that are shown on demand."""
    if not lines:
        return []
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""]
