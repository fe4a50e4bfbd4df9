"""The table of `stretto bench families`: every family equal, refused with the reason, or wrong."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from stretto.cli.tables import print_whole, table_of

_STYLES = {"equal": None, "refused": "yellow", "not built": "yellow"}
_ERRORS = {"loss": "loss_error", "logits": "logits_error", "gradients": "gradient_error"}


def show_families(result: dict[str, Any], console: Console) -> list[str]:
    """Print the table; the lines that stand below it."""
    title = f"{result['library']}, {result['ranks']} ranks against one, {result['plan']}"
    table = table_of(title, ("family", "is"), (*_ERRORS, "seconds"))
    for row in result["rows"]:
        errors = [_shown(row[key]) for key in _ERRORS.values()]
        style = _STYLES.get(row["verdict"], "bold red")
        table.add_row(row["family"], row["verdict"], *errors, f"{row['seconds']:.1f}", style=style)
    print_whole(console, table)
    for row in result["rows"]:
        if row["verdict"] != "equal":
            line = f"{row['family']} {row['verdict']}: {row['reason']}"
            console.print(Text(line, style=_STYLES.get(row["verdict"], "bold red") or ""))
    summary = result["summary"]
    counts = ", ".join(
        f"{summary[verdict]} {verdict.replace('_', ' ')}"
        for verdict in ("equal", "refused", "not_built", "wrong", "failed")
    )
    return [
        "errors: largest difference over the largest value, tiny random models in float64 (parts "
        "of many families compute in float32), "
        f"{result['tokens']} tokens; equal up to {result['tolerance']:g}",
        "not built: the installed library cannot make this model, with its own reason",
        f"{summary['families']} families: {counts}",
    ]


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"
