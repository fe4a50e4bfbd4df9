"""The table and lines that `stretto train` prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Columns of a row that say how fast it was, and how they are written.
_SPEED = {"median_s": ".3f", "tokens_per_second": ".0f", "mfu": ".0%"}


def show(result: dict[str, Any], notes: list[str], out: Path) -> None:
    """The runs side by side, what relates them, and where the files are."""
    console = Console(highlight=False, soft_wrap=True)
    if result["resumed"]:
        console.print(Text(result["resumed"]))
    console.print(_table(result))
    summary = result["summary"]
    lines = []
    if "speedup" in summary:
        lines.append(
            f"losses differ by {summary['loss_difference']:.1e} relative at most; speed-up "
            f"{summary['speedup']:.2f}x, ceiling {summary['ceiling']:.2f}x (as many independent "
            f"runs at once, on this machine), {summary['ceiling_ideal']:g}x (ideal)"
        )
    lines.append("MFU: model FLOPs over the rate of matrix products measured on this device")
    if result["checkpoint"]:
        lines.append(f"checkpoint: {result['checkpoint']}")
    for line in (*lines, *notes):
        console.print(Text(line, style="dim"))
    if result["files"]:
        console.print(Text(f"written: {out} ({', '.join(result['files'])})"))


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['plan']}; {result['device']}", box=SIMPLE_HEAD)
    table.title_justify = "left"
    table.add_column("run", no_wrap=True)
    for name in ("steps", "loss", "held out", "s per step", "tokens/s", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        held_out = row["held_out_loss"]
        table.add_row(
            row["who"],
            str(row["steps"]),
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            "-" if held_out is None else f"{held_out:.4f}",
            *(_or_dash(row[name], form) for name, form in _SPEED.items()),
        )
    return table


def _or_dash(value: float, form: str) -> str:
    """Nothing was timed where no step was left to do."""
    return "-" if math.isnan(value) else format(value, form)
