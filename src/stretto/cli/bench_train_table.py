"""The tables of `stretto bench train`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from stretto.cli.tables import print_whole, table_of


def show_train(result: dict[str, Any], console: Console) -> list[str]:
    """Print the tables of the three parts; lines on what stands behind them."""
    rows = result["rows"]
    print_whole(console, _speed([row for row in rows if row["part"] == "speed"]))
    print_whole(console, _losses([row for row in rows if row["part"] == "losses"]))
    summary, lost = result["summary"], next(row for row in rows if row["part"] == "lost rank")
    return [
        f"{lost['who']}: error after {lost['seconds_to_error']:.1f} s, "
        + ("names the rank and the checkpoint" if lost["named"] else "DOES NOT NAME the rank")
        + f"; resumed after step {lost['resumed_after']}, "
        + ("bitwise" if lost["bitwise"] else "NOT BITWISE"),
        f"two ranks: {summary['speedup_2ranks']:.2f}x by {summary['speedup_2ranks_by']}, ceiling "
        f"{summary['ceiling_2ranks']:.2f}x, one rank of two threads "
        f"{summary['speedup_2threads']:.2f}x",
        *result["notes"],
    ]


def _speed(rows: list[dict[str, Any]]) -> Table:
    title = f"{rows[0]['tokens']} tokens per step, {len(rows[0]['seconds'])} rounds"
    columns = ("seconds", "speed-up", "tokens/s", "busy", "loss")
    table = table_of(title, ("method",), columns)
    for row in rows:
        seconds, pairs = row["seconds"], row["speedup_pairs"]
        table.add_row(
            row["who"],
            f"{row['median_s']:.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
            f"{row['speedup']:.2f}x ({pairs['low']:.2f}-{pairs['high']:.2f})",
            f"{row['tokens_per_second']:.0f}",
            f"{row['busy']:.0%}",
            f"{row['loss_difference']:.0e}",
        )
    return table


def _losses(rows: list[dict[str, Any]]) -> Table:
    columns = ("ranks", "steps", "loss", "losses differ", "norms differ", "within 1e-9")
    table = table_of("float64, against one rank", ("model", "optimizer", "plan"), columns)
    for row in rows:
        table.add_row(
            row["model"],
            row["optimizer"],
            row["who"],
            str(row["ranks"]),
            str(row["steps"]),
            f"{row['loss']:.6f}",
            f"{row['loss_difference']:.1e}",
            f"{row['norm_difference']:.1e}",
            "yes" if row["within_tolerance"] else "NO",
        )
    return table
