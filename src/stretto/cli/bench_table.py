"""The tables and lines that `stretto bench` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stretto.cli.tables import print_whole, table_of


def show(result: dict[str, Any], out: Path) -> None:
    """The tables of a result by its case, what stands behind them, and where the file is."""
    console = Console(highlight=False)
    lines = _tables(result["case"])(result, console)
    load, cores = result["load"], result["cores"]
    lines.append(f"load average {load['before']:.1f} before, {load['after']:.1f} after")
    if result["busy"] and result["case"] not in ("exactness", "attention", "families"):
        lines.append(
            f"more than half of these {cores} cores were busy in the minute before: quote no time "
            "unless that work had ended"
        )
    for line in lines:
        console.print(Text(line, style="dim"))
    console.print(Text(f"written: {out}"))


def _tables(case: str) -> Callable[[dict[str, Any], Console], list[str]]:
    """What prints the tables of a case."""
    if case == "attention":
        from stretto.cli.attention_table import show_attention

        return show_attention
    if case == "links":
        from stretto.cli.links_table import show_links

        return show_links
    if case == "families":
        from stretto.cli.families_table import show_families

        return show_families
    if case == "train":
        from stretto.cli.bench_train_table import show_train

        return show_train
    return _exactness if case == "exactness" else _steps


# ---- exactness -------------------------------------------------------------------------------

_CHECKS = {
    "p=1": "degree 1",
    "restored": "restored",
    "p=2": "perfect p=2",
    "p=3": "perfect p=3",
    "p=4": "perfect p=4",
    "ranks": "ranks = emulation",
    "evals": "evaluations = plan",
    "bytes": "bytes = declared",
    "cfg": "cfg ranks = emulation",
}


def _exactness(result: dict[str, Any], console: Console) -> list[str]:
    title = f"exactness, {result['ranks']} gloo ranks"
    table = table_of(
        title, ("case", "pipeline", "scheduler", "walk"), (*_CHECKS, "cfg error", "is")
    )
    for row in result["rows"]:
        error = row["cfg error"]
        shown = "-" if error is None else "same bits" if error == 0 else f"{error:.0e}"
        marks = [_mark(row[key]) for key in _CHECKS.values()]
        style = {"exact": None, "refused": "yellow"}.get(row["verdict"], "bold red")
        named = (row["case"], _short(row["pipeline"], "Pipeline"), _short(row["scheduler"]))
        table.add_row(*named, row["walk"] or "-", *marks, shown, row["verdict"], style=style)
    print_whole(console, table)
    summary = result["summary"]
    lines = [
        "p=1: hooks on one rank, bitwise the plain pipeline; p=2, 3, 4: windows with perfect "
        "guesses, bitwise sequential",
        "ranks, cfg: gloo processes bitwise the emulation; evals: forward passes counted, as "
        "planned; bytes: counted as declared (replay walk); -: does not apply",
        "cfg error: guidance on two ranks against the plain pipeline, relative (cut batches round "
        "differently)",
        f"{summary['cases']} cases: {summary['exact']} exact, {summary['refused']} refused, "
        f"{summary['wrong']} wrong",
    ]
    for row in result["rows"]:
        lines += [f"{row['case']} {key}: {row[key]}" for key in ("refused", "wrong") if row[key]]
    return lines


def _mark(holds: bool | None) -> str:
    return {True: "yes", False: "NO", None: "-"}[holds]


def _short(name: str, ending: str = "Scheduler") -> str:
    return name.removesuffix(ending).replace("Discrete", "").replace("StableDiffusion", "SD")


# ---- steps -----------------------------------------------------------------------------------


def _steps(result: dict[str, Any], console: Console) -> list[str]:
    rows = result["rows"]
    print_whole(console, _speed([row for row in rows if row["part"] == "speed"], result))
    print_whole(console, _fidelity([row for row in rows if row["part"] == "fidelity"]))
    seconds, summary = result["denoiser_seconds"], result["summary"]
    return [
        f"denoiser {seconds['median']:.3f} s per evaluation of one thread, half a batch "
        f"{result['half_batch_cost']:.2f} of it; guidance off has twice the pictures",
        "speed-up: of medians, in brackets of interleaved pairs; ceiling: steps / depth, half "
        "batches at measured cost, in brackets at one half",
        "evals, sent: per rank; busy: processor time in the denoiser over the time passed",
        "independent runs: both ranks at once, each for itself; together they reach "
        f"{summary['machine_2ranks']:.2f} of 2, which is what this machine leaves two ranks",
        *result["notes"][2:],
    ]


def _speed(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> Table:
    title = f"{rows[0]['steps']} steps, {result['repeats']} rounds, interleaved; {result['device']}"
    columns = ("seconds", "speed-up", "ceiling", "of it", "depth", "evals", "sent", "busy", "PSNR")
    table = table_of(title, ("method", "guidance"), columns)
    for row in rows:
        table.add_row(row["who"], "on" if row["guidance"] else "off", *_speed_cells(row))
    return table


def _speed_cells(row: dict[str, Any]) -> list[str]:
    pairs = row["speedup_pairs"]
    planned = "depth" in row
    psnr = "same bits" if row.get("identical") else f"{row['psnr_db']:.1f} dB"
    seconds = row["seconds"]
    return [
        f"{row['median_s']:.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
        f"{row['speedup']:.2f}x ({pairs['low']:.2f}-{pairs['high']:.2f})",
        f"{row['ceiling']:.2f}x ({row['ceiling_ideal']:.2f})" if planned else "-",
        f"{row['of_ceiling']:.0%}" if planned else "-",
        f"{row['depth']:.1f}" if planned else str(row["steps"]),
        " ".join(map(str, sorted(set(row["evaluations"]), reverse=True))),
        f"{max(row['bytes_sent']) / 1e6:.2f} MB" if planned else "-",
        f"{row['denoiser_s'] / row['median_s']:.0%}",
        "reference" if row["who"] == "sequential" else psnr,
    ]


def _fidelity(rows: Sequence[dict[str, Any]]) -> Table:
    title = f"against sequential, {rows[0]['steps']} steps, {rows[0]['images']} held-out pictures"
    columns = ("p", "depth", "PSNR", "worst picture", "relative L2")
    table = table_of(title, ("model", "method"), columns)
    for row in rows:
        cells = [str(row["degree"]), str(row["depth"]), *map(_db, (row["psnr_db"],))]
        cells += [_db(row["psnr_worst_item_db"]), f"{row['relative_l2']:.1e}"]
        table.add_row(row["model"], _method(row), *cells)
    return table


def _method(row: dict[str, Any]) -> str:
    guesses = row.get("guesses")
    return f"{row['who']} ({guesses})" if guesses else row["who"].removesuffix("Scheduler")


def _db(value: float | None) -> str:
    return "same bits" if value in (None, float("inf")) else f"{value:.1f} dB"
