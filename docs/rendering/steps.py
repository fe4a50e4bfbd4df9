"""Sections of results of denoising steps in parallel."""

from __future__ import annotations

import math
from typing import Any

from rendering.cells import cell, folded, percent, spread, table, times

Result = dict[str, Any]


def on_cores(result: Result) -> list[str]:
    """Speed on two cores beside its ceiling, then fidelity by depth."""
    speed = [
        (
            row["who"],
            "on" if row["guidance"] else "off",
            spread(row["seconds"]),
            times(row["speedup"]),
            times(row["ceiling"]) if "ceiling" in row else "-",
            f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else "-",
            _db(row["psnr_db"]),
        )
        for row in result["rows"]
        if row["part"] == "speed"
    ]
    columns = ("method", "guidance", "seconds", "speed", "ceiling", "of it", "PSNR")
    fidelity = [
        (
            row["model"],
            row["degree"],
            row["depth"],
            f"{row['who']} ({row['guesses']})" if row.get("guesses") else row["who"],
            _db(row["psnr_db"]),
            _db(row["psnr_worst_item_db"]),
        )
        for row in result["rows"]
        if row["part"] == "fidelity"
    ]
    names = ("model", "p", "depth", "method", "PSNR", "worst picture")
    shown = folded("Fidelity at equal depth, methods side by side", table(names, fidelity))
    return [*table(columns, speed), *shown]


def _db(value: float | None) -> str:
    return "same bits" if value in (None, float("inf")) else f"{value:.1f} dB"


def exactness(result: Result) -> list[str]:
    """Counts, and every case that is not exact."""
    told = result["summary"]
    words = f"{told['cases']} cases: {told['exact']} exact, {told['refused']} refused"
    odd = [
        (row["case"], row["verdict"], row["refused"] or row["wrong"])
        for row in result["rows"]
        if row["verdict"] != "exact"
    ]
    return [f"{words}, {told['wrong']} wrong.", "", *table(("case", "is", "why"), odd)]


def slices(result: Result) -> list[str]:
    """Every row against one slice alone and one slice while all work."""
    rows = [_parallel(row) for row in result["rows"] if "speedup" in row]
    columns = (
        "method",
        "windows",
        "seconds",
        "loop / alone",
        "loop / working",
        "end to end / alone",
        "ceiling",
    )
    claim = result.get("published_claim")
    lines = [f"Shape {cell(result['shape'])}, {result['dtype']}, random weights.", ""]
    if claim:
        lines = [f"Published: {claim['speedup']}x on {claim['devices']} devices. {lines[0]}", ""]
    return [*lines, *table(columns, rows)]


def _parallel(row: Result) -> tuple[object, ...]:
    speed = row["speedup"]
    return (
        row["who"] + ("" if row["basis"] == "measured" else f" ({row['basis']})"),
        row["depth_windows"],
        spread(row["seconds"]["loop"]),
        times(speed["loop_vs_alone"]),
        times(speed["loop_vs_working"]),
        times(speed["end_to_end_vs_alone"]),
        times(row["ceiling"]),
    )


def gpus(result: Result) -> list[str]:
    """The same with a GPU per rank, beside what slices of one GPU predicted."""
    columns = (
        "method",
        "windows",
        "seconds",
        "loop / one GPU",
        "loop / working",
        "end to end",
        "ceiling",
        "predicted by slices",
        "above prediction",
    )
    rows = []
    for row in result["rows"]:
        if "speedup" in row:
            told = row["prediction"]
            predicted = f"{told['loop']['alone']:.2f}x ({told['how']})" if told else "-"
            above = told and told["measured_over_predicted_percent"]["alone"]
            name = f"{row['model']}: " if "model" in row else ""
            first, *rest = _parallel(row)
            rows.append((f"{name}{first}", *rest, predicted, percent(above)))
    return [*table(columns, rows), *skipped(result)]


def skipped(result: Result) -> list[str]:
    """What was not run, by name."""
    names = {
        (each.get("model", "") + " " + each["who"]).strip(): each["why"]
        for each in result.get("skipped", [])
    }
    return table(("not run", "why"), names.items())


BEYOND = "beyond_steps_percent"
OVERHEAD = (
    "what",
    "percent above as many plain evaluations",
    "above the plain run whose other evaluations are free",
    "above such a run of as many scheduler steps",
    "quiet rounds: above the plain, free or as many",
    "ms of it per window",
    "same bits",
)


def _of_quiet_rounds(row: dict) -> str | None:
    """Medians of the rounds that found the host quiet, and how many those are."""
    if "quiet" not in row:
        return None
    medians = [
        row[each]["quiet_median"]
        for each in ("overhead_percent", "added_percent", BEYOND)
        if each in row
    ]
    words = ", ".join("-" if value is None else f"{value:+.2f}" for value in medians)
    return f"{words} ({sum(row['quiet'])} of {len(row['quiet'])})"


def overhead(result: Result) -> list[str]:
    """What hooks and replay cost per scheduler, and larger batches."""
    rows = [
        (
            row["who"],
            _signed(row["overhead_percent"]),
            *(_signed(row[each]) if each in row else None for each in ("added_percent", BEYOND)),
            _of_quiet_rounds(row),
            row.get("extra_ms_per_window"),
            row.get("bitwise"),
        )
        for row in result["rows"]
        if "overhead_percent" in row
    ]
    curves = [
        (row["who"], *row["over_one"].values()) for row in result["rows"] if "over_one" in row
    ]
    sizes = next((list(row["over_one"]) for row in result["rows"] if "over_one" in row), [])
    counted = result["summary"].get("recompiles")
    evaluation = spread(result["evaluation_s"]["all"])
    return [
        f"One evaluation takes {evaluation} s.",
        "",
        *table(OVERHEAD, rows),
        *table(("time by batches, of one", *sizes), curves),
        *([] if counted is None else [f"Compilations during parallel runs: {counted}.", ""]),
    ]


def _signed(value: dict[str, Any]) -> str:
    return f"{value['median']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"


def fidelity(result: Result) -> list[str]:
    """At equal depth: ours, the published schedule, and the best that fewer plain steps give."""
    columns = ("N", "shift", "p", "depth", "ceiling", "tail", "published", "best plain steps")
    points = table(
        (*columns, "ours >= published", "ours >= plain"),
        map(_point, result["summary"]["equal_depth_psnr_db"]),
    )
    trained = result["training"]
    return [
        f"DiT of {trained['parameters'] / 1e6:.0f} M parameters, trained for "
        f"{trained['seconds']} s. PSNR against the sequential result of as many steps; best plain "
        "steps: the best of three solvers that make as many evaluations on one device.",
        "",
        *folded("All points of equal depth", points),
    ]


def _point(each: Result) -> tuple[object, ...]:
    ours, *others = levels(each)
    return (
        *(each[key] for key in ("steps", "shift", "degree", "depth")),
        times(each["ceiling"]),
        _db(ours),
        *("-" if other is None else _db(other) for other in others),
        *(None if other is None else ours >= other for other in others),
    )


def levels(each: Result) -> tuple[float, float | None, float | None]:
    """dB of the tail, the published schedule and the best plain solver at one depth.

    Infinite where the bits are equal, which a result writes as null; None where it was not run.
    """
    found = {who: math.inf if each[who] is None else each[who] for who in each}
    plain = [value for who, value in found.items() if who.startswith("fewer steps")]
    return found["tail"], found.get("parastep"), max(plain, default=None)
