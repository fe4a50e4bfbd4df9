"""The table and the lines that `stretto generate` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 116
_PER_RANK = ("evals", "exchanges", "sent")


def show(result: dict[str, Any], out: Path, files: Sequence[str]) -> None:
    """A line for one method, a table for several, and where the files are."""
    console = Console(highlight=False)
    # A narrower table loses its numbers; a narrower terminal folds it.
    console.width = max(console.width, _WIDTH)
    rows = result["rows"]
    if len(rows) > 1:
        console.print(_table(result))
        for line in _remarks(result):
            console.print(Text(line, style="dim"))
    else:
        console.print(Text(_line(result, rows[0])))
    shown = "compare.png" if "compare.png" in files else files[0]
    if "grid.png" in files and len(rows) == 1:
        shown = "grid.png"
    console.print(Text(f"{out / shown} and {len(files) - 1} more, with result.json"))
    older = sorted(file.name for file in out.iterdir() if file.name not in files)
    if older:
        console.print(Text(f"{out} also holds {_some(older)}, not of this run", style="dim"))


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _line(result: dict[str, Any], row: dict[str, Any]) -> str:
    parts = [f"{result['plan']}: {_steps(row)} in depth {row['depth']:g}"]
    if row["seconds"]:
        parts.append(f"{row['seconds'][0]:.2f} s (measured, {result['device']})")
    parts.append(f"{_each(row['evaluations'])} evaluations and {_sent(row)} sent per rank")
    if row.get("worst_guess"):
        parts.append(f"worst guess error {row['worst_guess']:.2%}")
    return ", ".join(parts)


def _steps(row: dict[str, Any]) -> str:
    asked, made = row["steps"], row["scheduler_steps"]
    return f"{made} steps" if made == asked else f"{made} steps of the scheduler ({asked} asked)"


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['case'].partition('/')[2]}, {result['repeats']} repeats each, interleaved"
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.caption = f"measured, {result['device']}"
    table.add_column("who", no_wrap=True)
    for name in ("seconds", "speed-up", "ceiling", "of it", "depth", *_PER_RANK, "PSNR"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    timed = "speedup" in row
    return [
        row["who"] if row["who"] != "fewer steps" else f"fewer steps ({row['steps']})",
        _seconds(row) if timed else "-",
        f"{row['speedup']:.2f}x" if timed else "-",
        f"{row['ceiling']:.2f}x",
        f"{row['efficiency']:.0%}" if timed else "-",
        f"{row['depth']:.1f}",
        _each(row["evaluations"]),
        _each(row["network_calls"]),
        _sent(row),
        _psnr(row),
    ]


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['median_s']:.2f} ({min(row['seconds']):.2f}-{max(row['seconds']):.2f})"


def _each(values: Sequence[int]) -> str:
    """One number where all ranks have it, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def _sent(row: dict[str, Any]) -> str:
    return f"{max(row['bytes_sent']) / 1e6:.2f} MB"


def _psnr(row: dict[str, Any]) -> str:
    if "psnr_db" not in row:
        return "-"
    if row["who"] == "sequential":
        return "reference"
    return "same bits" if row["identical"] else f"{row['psnr_db']:.1f} dB"


def _remarks(result: dict[str, Any]) -> list[str]:
    summary = result["summary"]
    floor = summary.get("noise_floor_db")
    lines = [
        f"ours: {result['plan']}",
        "depth: sequential steps' worth of time, cut batches at their measured cost "
        f"({_costs(summary['evaluation_cost'])}); ceiling: steps / depth",
        "evals (denoiser), exchanges, bytes sent: per rank; PSNR: against sequential",
    ]
    if floor is not None:
        value = "same bits" if summary["noise_floor_identical"] else f"{floor:.1f} dB"
        lines.append(f"noise floor: {value} (sequential with its batch cut in two: rounding alone)")
    if result["emulated"]:
        lines.append("emulated: ranks took turns in one process, so there are no times")
    load, cores = result["load"], result["cores"]
    lines.append(f"load average {load['before']:.1f} before, {load['after']:.1f} after")
    if not result["emulated"] and load["before"] > cores / 2:
        lines.append(
            f"more than half of these {cores} cores were busy in the minute before: quote no time "
            "unless that work had ended"
        )
    return lines


def _costs(costs: dict[str, float]) -> str:
    shown = [f"{name} {value:.2f}" for name, value in costs.items() if name != "step1 x cfg1"]
    return ", ".join(shown) or "none cut"
