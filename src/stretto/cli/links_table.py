"""The tables of `stretto bench links`: a table per case, what bounds every plan beside its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from stretto.bench.links_cases import FAST, FREE
from stretto.bench.links_summary import cases
from stretto.cli.tables import print_whole, table_of

_COLUMNS = (
    "forward",
    "both, median",
    "both, min",
    "ideal",
    "floor",
    "kernels",
    "predicted",
    "repeats",
)


_OTHERS = {
    "startrail": "StarTrail",
    "auto": "auto",
    "auto_keep_none": "auto without kept blocks",
}


def show_links(result: dict[str, Any], console: Console) -> list[str]:
    """Print the tables; the lines that stand below them."""
    for case in cases(result["rows"]):
        first = case[0]
        fast = "fast_" * (first["mode"] == FAST)
        megabits = result[f"{fast}rate_bytes_per_s"] * 8 / 1e6
        title = (
            f"{first['layout']} nodes x ranks, {first['heads']}, {first['mode']}, "
            f"{megabits:g} Mbit/s per node, ms; fastest first"
        )
        print_whole(console, _case(title, case))
    summary = result["summary"]
    lines = [
        *_ratios(summary),
        f"auto over the best named plan: at worst {_two(summary['auto_over_best_worst'])} of "
        f"medians, {_two(summary['auto_over_best_worst_min'])} of fastest repeats; within 10 % "
        f"everywhere: {summary['auto_within_10pct_of_best']}",
        f"predicted over measured: median {_two(summary['predicted_over_measured'])}",
        "both: forward and backward; ideal: what the busiest link needs; floor: the same plan on "
        "free links; kernels: modelled, slept",
    ]
    return [*lines, *result["notes"]]


def _case(title: str, rows: Sequence[dict[str, Any]]):
    table = table_of(title, ("plan", "keeps"), _COLUMNS)
    for row in sorted(rows, key=lambda row: row["measured_ms"]["total"]["median"]):
        measured, floor = row["measured_ms"], row["floor_ms"]
        times = (
            measured["forward"]["median"],
            measured["total"]["median"],
            measured["total"]["min"],
            row["ideal_ms"]["total"],
            floor["total"]["median"] if floor else None,
            row["kernel_ms"]["total"],
            row["predicted_ms"]["total"],
        )
        cells = ["-" if time is None else f"{time:.0f}" for time in times]
        style = "bold" if row["who"].startswith("auto") else None
        table.add_row(row["who"], row["keep"], *cells, str(row["repeats"]), style=style)
    return table


def _ratios(summary: dict[str, Any]) -> list[str]:
    """Ring over others on two nodes of eight, if that was run."""
    if summary["ring_over_auto_2x8"] is None:
        return []
    lines = []
    for mode, ending in ((FREE, ""), (FAST, "_fast_links")):
        for key, other in _OTHERS.items():
            name = f"ring_over_{key}_2x8{ending}"
            lines.append(
                f"2x8, {mode}: ring / {other} {_two(summary[name])} forward and backward "
                f"(fastest {_two(summary[name + '_min'])}, ideal {_two(summary[name + '_ideal'])})"
                f", {_two(summary[name + '_forward'])} forward "
                f"(ideal {_two(summary[name + '_forward_ideal'])})"
            )
    return lines


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
