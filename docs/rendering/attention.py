"""Sections of results of attention over ranks and of training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rendering.cells import cell, folded, gigabytes, percent, spread, table, times
from rendering.steps import skipped

Result = dict[str, Any]
#: Above torch's own time by more than this many percent is a loss.
NEAR = 5.0


def kernels(result: Result) -> list[str]:
    """The summary, and every local path that is slower than torch's own by more than 5 %."""
    told = result["summary"]
    bad = told.get("checks_wrong", [])
    checks = [("checks right", told.get("checks_ok", 0)), ("checks wrong", len(bad))]
    rates = [
        (name, value) for name, value in told.items() if name.endswith(("_percent", "_tokens"))
    ]
    slow = sorted(
        (
            (row["who"], spread(row["ms"]), percent(row["ours_over_torch_percent"]))
            for row in result["rows"]
            if row.get("ours_over_torch_percent", 0.0) > NEAR
        ),
        key=lambda row: -float(row[2].split()[0]),
    )
    wrong = ", ".join(f"`{name}`" for name in bad)
    return [
        *table(("figure", "value"), [*checks, *rates]),
        *([f"Wrong: {wrong}.", ""] if wrong else []),
        *table((f"more than {NEAR:g} % above torch", "ms", "above"), slow),
    ]


def peers(result: Result) -> list[str]:
    """Bytes and errors beside ring-flash-attention and USP."""
    told = result["summary"]
    rows = [
        (
            name,
            f"{ratio:.4g}",
            f"{told['backward_over_peer'][name]:.4g}",
            f"{told['error_over_peer'][name]:.4f}",
        )
        for name, ratio in told["gradients_over_peer"].items()
    ]
    columns = ("ranks", "heads", "who", "forward_blocks", "gradients_blocks", "backward_blocks")
    blocks = [[row[name] for name in columns] for row in result["rows"] if row["forward_bytes"]]
    names = ("ours beside", "bytes of dK, dV", "bytes of backward", "error")
    return [
        *table(names, rows),
        *folded("Blocks that a rank sends", table([c.replace("_", " ") for c in columns], blocks)),
    ]


def gpus(result: Result) -> list[str]:
    """Per case: one GPU, torch's own, and of our plans the best, the worst and auto by carrier."""
    timed = [row for row in result["rows"] if "median_ms" in row]
    lines = [_gate(result["rows"]), ""]
    lines += table(_LINK_COLUMNS, _links(result))
    for case, rows in groupby(timed, key=lambda row: (row["section"], row["tokens"])):
        own = list(rows)
        heads = "{}:{}".format(*own[0]["heads"])
        lines += [f"**{case[0]}, {case[1]} tokens, {heads} heads**", ""]
        lines += table(_GPU_COLUMNS, map(_gpu_row, _shown(own)))
    failed = [(row["who"], row["error"]) for row in result["rows"] if "error" in row]
    return [*lines, *table(("failed", "why"), failed), *skipped(result)]


_LINK_COLUMNS = (
    "carrier",
    "GB/s each way",
    "latency us",
    "fit off by",
    "of a message's time, lost to kernels",
)
_GPU_COLUMNS = (
    "plan",
    "carrier",
    "ms",
    "of one GPU",
    "exposed",
    "above prediction",
    "TFLOP/s a GPU",
    "bytes as declared",
)


def _gate(rows: Sequence[Result]) -> str:
    tried = [row for row in rows if "ok" in row]
    wrong = [row["who"] for row in tried if not row["ok"]]
    named = f": {', '.join(wrong)}" if wrong else ""
    return f"Gate: {len(tried)} plans against float32, {len(wrong)} wrong{named}."


def _links(result: Result) -> list[tuple[object, ...]]:
    return [
        (
            carrier,
            told["fit"]["rate"] / 1e9,
            told["fit"]["latency"] * 1e6,
            f"{told['fit']['spread']:.0%}",
            told.get("displaces", "-"),
        )
        for carrier, told in result.get("links", {}).items()
    ]


def _shown(rows: Sequence[Result]) -> list[Result]:
    """What a reader asks of a case first; fastest first."""
    ours = [row for row in rows if "exposed_ms" in row]
    kept = [row for row in rows if "exposed_ms" not in row]
    for carrier in dict.fromkeys(row["carrier"] for row in ours):
        named = [r for r in ours if r["carrier"] == carrier and r["name"] != "auto"]
        named.sort(key=lambda row: row["median_ms"])
        kept += [*named[:1], *named[1:][-1:]]
        kept += [r for r in ours if r["carrier"] == carrier and r["name"] == "auto"]
    return sorted(kept, key=lambda row: row["median_ms"])


def _gpu_row(row: Result) -> tuple[object, ...]:
    return (
        f"{row['name']} = {row['plan']}" if row["name"] == "auto" else row["name"],
        row.get("carrier", "-"),
        spread(row["ms"]),
        times(row["over_one_gpu"]),
        f"{row['exposed_percent']:.0f} %" if "exposed_percent" in row else "-",
        percent(row.get("model_error_percent"), 0),
        f"{row['tflops_per_gpu']:.0f}",
        row.get("bytes_match"),
    )


def projection(result: Result) -> list[str]:
    """Percent over ring by cluster and model, from the least to the most of all lengths."""
    rows = []
    ordered = sorted(result["rows"], key=lambda row: (row["cluster"], row["model"]))
    for (cluster, model), group in groupby(ordered, key=lambda row: (row["cluster"], row["model"])):
        own = list(group)
        lengths = sorted({row["tokens"] for row in own})
        cells = [
            _range([r["over_ring_percent"] for r in own if _family(r) == name])
            for name in ("startrail", "usp", "choice")
        ]
        rows.append((cluster, model, f"{lengths[0]} to {lengths[-1]}", *cells))
    told = result["summary"]
    published = [
        f"{told[f'published_over_ring_{kind}_percent']:+.0f} % ({kind.upper()})"
        for kind in ("gpt", "dit")
    ]
    columns = ("cluster", "model", "tokens", "StarTrail / ring", "USP / ring", "choice / ring")
    words = (
        f"Published for StarTrail over ring: {' and '.join(published)}. Nothing here is measured"
    )
    return [f"{words}: exact bytes, kernel rates {result['kernel']}.", "", *table(columns, rows)]


def _family(row: Result) -> str:
    return row["key"].split("(")[0]


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{percent(min(values), 0)} to {percent(max(values), 0)}"


def links(result: Result) -> list[str]:
    """Per layout: the ring, the best named plan, StarTrail and auto, beside the link's ideal."""
    rows = []
    for case, group in groupby(result["rows"], key=lambda r: (r["layout"], r["heads"], r["mode"])):
        own = sorted(group, key=_total)
        named = [row for row in own if row["named"]]
        trail = [row for row in named if row["who"].startswith("startrail")]
        autos = [row for row in own if row["who"] == "auto"]
        picks = [next((r for r in named if r["who"] == "ring"), None), *trail[:1], *autos[:1]]
        rows += [(" ".join(case), *_link(row)) for row in (*picks, *named[:1], *named[-1:]) if row]
    told = result["summary"]
    ratios = [
        (name, *(told.get(f"{name}_{way}") if way else told[name] for way in ("", "min", "ideal")))
        for name in told
        if name.startswith("ring_over") and not name.endswith(("_min", "_ideal"))
    ]
    columns = ("case", "plan", "forward + backward ms", "ideal ms", "predicted ms")
    return [
        *table(("ratio", "of medians", "of fastest", "ideal"), ratios),
        f"auto over the best named plan: at worst {cell(told['auto_over_best_worst'])}; predicted "
        f"over measured {cell(told['predicted_over_measured'])} in the median.",
        "",
        *folded(
            "Ring, StarTrail, auto, best and worst named plan of every case",
            table(columns, dict.fromkeys(rows)),
        ),
    ]


def _total(row: Result) -> float:
    return row["measured_ms"]["total"]["median"]


def _link(row: Result) -> tuple[object, ...]:
    parts = (row["ideal_ms"]["total"], row["predicted_ms"]["total"])
    return (row["who"], spread(row["ms"]), *(f"{value:.0f}" for value in parts))


# ---- training ------------------------------------------------------------------------------------


def training(result: Result) -> list[str]:
    """Speed on two cores, a lost rank, and losses against one rank."""
    speed = [
        (row["who"], spread(row["seconds"]), times(row["speedup"]), row["tokens_per_second"])
        for row in result["rows"]
        if row["part"] == "speed"
    ]
    told = result["summary"]
    lost = next(row for row in result["rows"] if row["part"] == "lost rank")
    return [
        *table(("method", "seconds", "speed", "tokens/s"), speed),
        f"Ceiling {told['ceiling_2ranks']:.2f}x. {lost['who']}: error after "
        f"{lost['seconds_to_error']:.1f} s, names the rank: {cell(lost['named'])}; resumed "
        f"bitwise: {cell(lost['bitwise'])}. {told['plans']} plans in float64: losses differ from "
        f"one rank by at most {told['max_loss_difference_fp64']:.1e}.",
        "",
    ]


def slices(result: Result) -> list[str]:
    """One long sequence on slices of one GPU: time and what differs from one device."""
    rows = [
        (
            row["who"],
            spread(row["ms"]),
            times(row["faster"]) if "faster" in row else "-",
            _exponent(row.get("gradient_error")),
            row.get("gradient_over_own"),
            _exponent(row.get("loss_difference")),
            gigabytes(max(row["peak_bytes"])),
        )
        for row in result["rows"]
    ]
    columns = (
        "plan",
        "ms a step",
        "of one slice",
        "gradients off by",
        "of bfloat16's own",
        "losses off by",
        "peak of a rank",
    )
    words = f"{result['tokens']} tokens in one sequence, errors relative, against float32."
    return [words, "", *table(columns, rows), *skipped(result)]


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def train_gpus(result: Result) -> list[str]:
    """Rates of every plan on the longest sequence that fits, and the model's figure beside."""
    rows = [
        (
            f"{row['who']} = {row['plan']}",
            row["tokens"],
            spread(row["ms"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['tflops_per_gpu']:.0f}",
            _share(row["mfu_of_data_sheet"]),
            _share(row["mfu_of_matmul"]),
            percent(row.get("model_error_percent"), 0),
            gigabytes(row["peak_bytes"]),
            f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}",
        )
        for row in result["rows"]
    ]
    columns = (
        "plan",
        "tokens",
        "ms a step",
        "tokens/s",
        "TFLOP/s a GPU",
        "of data sheet",
        "of matrix product",
        "above prediction",
        "peak of a rank",
        "loss",
    )
    limit = result.get("length", {}).get("limit", "--tokens")
    words = f"{result['model']}; the length was limited by {limit}."
    return [words, "", *table(columns, rows), *skipped(result)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# ---- models, the mesh ----------------------------------------------------------------------------


def families(result: Result) -> list[str]:
    """Counts, and every family that is not equal with its reason."""
    told = result["summary"]
    counts = ", ".join(
        f"{told[name]} {name.replace('_', ' ')}"
        for name in ("equal", "refused", "not_built", "wrong", "failed")
    )
    odd = [
        (row["family"], row["verdict"], row["reason"])
        for row in result["rows"]
        if row["verdict"] != "equal"
    ]
    return [
        f"{told['families']} families of {result['library']}: {counts}.",
        "",
        *folded("Those that are not equal, and why", table(("family", "is", "why"), odd)),
    ]


def kill(result: Result) -> list[str]:
    """Who named the killed rank, and when the others ended."""
    rows = [
        (
            row["carrier"],
            row["work"],
            _seconds([s["error_after_s"] for s in row["survivors"]]),
            _seconds([s["end_after_s"] for s in row["survivors"]]),
            row["all_named"],
            len(row["by_signal"]),
            row["ok"],
        )
        for row in result["rows"]
    ]
    columns = (
        "carrier",
        "work",
        "error after",
        "ended after",
        "all name the rank",
        "ended by a signal",
        "right",
    )
    words = f"One rank killed by SIGKILL; the deadline is {result['timeout_s']:g} s."
    return [words, "", *table(columns, rows), *skipped(result)]


def _seconds(values: Sequence[float | None]) -> str:
    """The slowest; a survivor without one did not end."""
    if not values or None in values:
        return "**never**"
    return f"{max(values):.2f} s"


def exchange(result: Result) -> list[str]:
    """Time and rate of a hop by size, carriers side by side, and how waits end."""
    carriers = list(dict.fromkeys(row["who"] for row in result["rows"]))
    rows = []
    by_size = {(r["who"], r["verb"], r["bytes"]): r for r in result["rows"]}
    for verb, size in dict.fromkeys((row["verb"], row["bytes"]) for row in result["rows"]):
        found = [by_size.get((carrier, verb, size)) for carrier in carriers]
        rows.append((verb, size, *(_hop(row) for row in found)))
    told = result["summary"]
    waits = [(name, f"{seconds:.2f} s") for name, seconds in told["waits_ended_s"].items()]
    return [
        f"Same bits over all carriers: {cell(told['digests_equal'])}; who is to blame is named: "
        f"{cell(told['culprit_named'])}.",
        "",
        *table(("verb", "bytes", *carriers), rows),
        *table(("wait", "ended after"), waits),
        *table(("failed", "why"), told["errors"].items()),
    ]


def _hop(row: Result | None) -> str:
    return "-" if row is None else f"{1e3 * row['ms']:.0f} us, {row['rate'] / 1e9:.3g} GB/s"
