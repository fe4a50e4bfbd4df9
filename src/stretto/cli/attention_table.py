"""The tables of `stretto bench attention`: what was run and how exact it was, and the bytes."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from stretto.cli.tables import print_whole, table_of

#: Families of plans in the byte table, in its order.
_FAMILIES = ("ring", "startrail", "tile", "usp", "ulysses x tile", "ulysses", "pass-q")


def show_attention(result: dict[str, Any], console: Console) -> list[str]:
    """Print both tables; the lines that stand below them."""
    exact = [row for row in result["rows"] if row["part"] == "exact"]
    checked = [row for row in result["rows"] if row["part"] == "gradcheck"]
    print_whole(console, _exact(exact))
    for title, key in (("forward", "forward_blocks"), ("forward + backward", "both")):
        print_whole(
            console, _bytes([row for row in result["rows"] if row["part"] == "bytes"], title, key)
        )
    lines = [*_figures(result["summary"], len(checked))]
    wrong = [row for row in [*exact, *checked] if not row["right"]]
    lines += [f"WRONG {_where(row)}: {row.get('wrong', 'gradients')}" for row in wrong[:20]]
    if result["left_out"]:
        lines.append(f"{result['left_out']} runs left out: the time was up")
    return [*lines, *result["notes"]]


def _where(row: dict[str, Any]) -> str:
    return f"{row.get('carrier', 'gradcheck')} {row['ranks']} {row['plan']}"


def _exact(rows: list[dict[str, Any]]):
    table = table_of(
        "against one device in float64, forward and backward",
        ("ranks", "on"),
        ("plans", "calls", "runs", "max error", "declared", "closed", "= threads", "wrong"),
    )
    for carrier in ("threads", "gloo"):
        own = [row for row in rows if row["carrier"] == carrier]
        for ranks in sorted({row["ranks"] for row in own}):
            table.add_row(str(ranks), carrier, *_cells([r for r in own if r["ranks"] == ranks]))
    return table


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    errors = [row["max_err"] for row in rows if row["max_err"] is not None]
    runs, closed_of = (sum(row[name] for row in rows) for name in ("runs", "closed_of"))
    bits = [row["same_bits"] for row in rows if "same_bits" in row]
    return [
        str(len(rows)),
        str(len({case for row in rows for case in row["cases"]})),
        str(runs),
        f"{max(errors):.1e}" if errors else "-",
        f"{sum(row['declared'] for row in rows)}/{runs}",
        f"{sum(row['closed'] for row in rows)}/{closed_of}",
        f"{sum(bits)}/{runs}" if bits else "-",
        str(sum(not row["right"] for row in rows)),
    ]


def _bytes(rows: list[dict[str, Any]], title: str, key: str):
    table = table_of(
        f"blocks sent per rank, {title}; least of each family, ! more than the ring",
        ("ranks", "heads"),
        (*_FAMILIES, "ring / best"),
    )
    for ranks, heads in dict.fromkeys((row["ranks"], row["heads"]) for row in rows):
        own = [row for row in rows if (row["ranks"], row["heads"]) == (ranks, heads)]
        ring = _blocks(next(row for row in own if row["plan"] == "ring"), key)
        cells = [_family(own, family, key, ring) for family in _FAMILIES]
        best = min(_blocks(row, key) for row in own)
        table.add_row(str(ranks), heads, *cells, f"{ring / best:.1f}")
    return table


def _family(rows: list[dict[str, Any]], family: str, key: str, ring: float) -> str:
    own = [row for row in rows if re.sub(r"\(\d+\)", "", row["plan"]) == family]
    if not own:
        return "-"
    least = min(own, key=lambda row: _blocks(row, key))
    degrees = "x".join(re.findall(r"\d+", least["plan"]))
    blocks = _blocks(least, key)
    return f"{blocks:.4g}{'!' * (blocks > ring)}" + (f" ({degrees})" if degrees else "")


def _blocks(row: dict[str, Any], key: str) -> float:
    return row[key] if key in row else row["forward_blocks"] + row["backward_blocks"]


def _figures(summary: dict[str, Any], gradients: int) -> list[str]:
    def ratio(name: str) -> str:
        return "-" if summary[name] is None else f"{summary[name]:.2f}"

    error = summary["max_err_fp64"]
    return [
        f"{summary['runs']} runs of {summary['plans']} plans, up to {summary['virtual_ranks']} "
        f"virtual and {summary['gloo_ranks']} gloo ranks: {summary['wrong']} wrong",
        f"max_err_fp64 {'-' if error is None else f'{error:.1e}'}, bytes_match "
        f"{summary['bytes_match']}, gradcheck_ok {summary['gradcheck_ok']} ({gradients} plans)",
        f"at 64 ranks, one key head per query head, bytes counted forward: ring / startrail(4) "
        f"{ratio('ring_over_startrail_bytes_p64')}, ring / best within a node of 8 "
        f"{ratio('ring_over_best_bytes_p64')}",
    ]
