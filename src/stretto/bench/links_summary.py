"""The figures of `bench links`, from its rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stretto.bench.links_cases import FAST, FREE

Row = dict[str, Any]

#: How far auto may lie behind the best named plan that was measured.
WITHIN = 1.10


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that are quoted; None where nothing was run for them.

    Ratios are of medians, with those of the fastest repeats beside them (`_min`).
    """
    # On fast links not all named plans are run.
    whole = [case for case in cases(rows) if case[0]["mode"] != FAST]
    behind = {_name(case): auto_over_best(case) for case in whole}
    least = [auto_over_best(case, "min") for case in whole]
    predicted = [row["predicted_ms"]["total"] / _time(row) for row in rows]
    found: dict[str, Any] = {}
    for mode, ending in ((FREE, ""), (FAST, "_fast_links")):
        wanted = ("2x8", "MHA", mode)
        case = [row for row in rows if (row["layout"], row["heads"], row["mode"]) == wanted]
        for key, other in (("startrail", _startrail), ("auto", _auto), ("auto_keep_none", _lean)):
            found |= _ratios(f"ring_over_{key}_2x8{ending}", case, other)
    return found | {
        "auto_within_10pct_of_best": max(behind.values()) <= WITHIN if behind else None,
        "auto_over_best": behind,
        "auto_over_best_worst": max(behind.values(), default=None),
        "auto_over_best_worst_min": max(least, default=None),
        "predicted_over_measured": statistics.median(predicted) if predicted else None,
        "predicted_low_high": [min(predicted), max(predicted)] if predicted else None,
        "rank_correlation": {_name(case): rank_correlation(case) for case in whole},
        "layouts": len({row["layout"] for row in rows}),
        "plans": len({row["who"] for row in rows}),
        "others": max((row["others"] for row in rows), default=0.0),
    }


def cases(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that can be compared: of one layout, call and mode."""
    keys = dict.fromkeys((row["layout"], row["heads"], row["mode"]) for row in rows)
    for key in keys:
        yield [row for row in rows if (row["layout"], row["heads"], row["mode"]) == key]


def auto_over_best(case: Sequence[Row], statistic: str = "median") -> float:
    """Time of auto over that of the fastest named plan, forward and backward."""
    best = min(_time(row, statistic=statistic) for row in case if row["named"])
    return _time(_auto(case), statistic=statistic) / best


def rank_correlation(case: Sequence[Row]) -> float:
    """Spearman's: 1 when the predicted times put the plans in the measured order."""
    measured = _places([_time(row) for row in case])
    predicted = _places([row["predicted_ms"]["total"] for row in case])
    return statistics.correlation(measured, predicted)


def _places(values: Sequence[float]) -> list[float]:
    """Place of each value in ascending order, the mean place of equal ones."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def _ratios(key: str, case: Sequence[Row], other: Callable) -> dict[str, float | None]:
    """The ring's time over another plan's: forward and backward together, and forward alone."""
    found: dict[str, float | None] = {}
    for ending, which in (("", "total"), ("_forward", "forward")):
        for tail, statistic in (("", "median"), ("_min", "min")):
            found[key + ending + tail] = _ratio(case, other, which, statistic)
        found[key + ending + "_ideal"] = _ratio(case, other, which, None)
    return found


def _ratio(case: Sequence[Row], other: Callable, which: str, statistic: str | None):
    if not case:
        return None
    ring = next(row for row in case if row["who"] == "ring")
    if statistic is None:
        return ring["ideal_ms"][which] / other(case)["ideal_ms"][which]
    return _time(ring, which, statistic) / _time(other(case), which, statistic)


def _startrail(case: Sequence[Row]) -> Row:
    """Its fastest published point."""
    return min((row for row in case if row["who"].startswith("startrail")), key=_time)


def _auto(case: Sequence[Row]) -> Row:
    return next(row for row in case if row["who"] == "auto")


def _lean(case: Sequence[Row]) -> Row:
    """Auto among plans that keep nothing for backward."""
    found = [row for row in case if row["who"] == "auto, keep none"]
    return found[0] if found else _auto(case)


def _time(row: Row, which: str = "total", statistic: str = "median") -> float:
    return row["measured_ms"][which][statistic]


def _name(case: Sequence[Row]) -> str:
    row = case[0]
    return f"{row['layout']} {row['heads']} {row['mode']}"
