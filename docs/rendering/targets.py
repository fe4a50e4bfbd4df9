"""What was to be shown, and what the results say of it: a line per target and result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rendering.cells import cell
from rendering.sections import kind_of
from rendering.steps import levels

Result = dict[str, Any]
#: What was found, and whether that is what was to be shown; None for a figure without a target.
Found = tuple[str, bool | None]


class Target(NamedTuple):
    """A statement about results of a case; `found` is None where a result says nothing of it."""

    case: str
    what: str
    wanted: str
    found: Callable[[Result], Found | None]


def lines(results: dict[str, Result]) -> Iterator[tuple[str, str, str, bool | None, str]]:
    """What, wanted, found, whether met, and the name of the result, for all that apply."""
    for target in TARGETS:
        for name, result in results.items():
            if kind_of(result["case"]) == target.case:
                found = target.found(result)
                if found is not None:
                    yield target.what, target.wanted, *found, name


def at_most(key: str, limit: float, unit: str = "") -> Callable[[Result], Found | None]:
    return _limited(key, lambda value: value <= limit, unit)


def at_least(key: str, limit: float, unit: str = "") -> Callable[[Result], Found | None]:
    return _limited(key, lambda value: value >= limit, unit)


def _limited(key: str, holds: Callable[[float], bool], unit: str):
    def found(result: Result) -> Found | None:
        value = result["summary"].get(key)
        return None if value is None else (cell(value) + unit, holds(value))

    return found


def true(key: str) -> Callable[[Result], Found | None]:
    def found(result: Result) -> Found | None:
        value = result["summary"].get(key)
        return None if value is None else (cell(value), bool(value))

    return found


def figure(key: str, unit: str = "") -> Callable[[Result], Found | None]:
    """Stated without a target."""

    def found(result: Result) -> Found | None:
        value = result["summary"].get(key)
        return None if value is None else (cell(value) + unit, None)

    return found


def near_torch(suffix: str) -> Callable[[Result], Found | None]:
    """Local attention paths within 5 % of torch's own."""

    def found(result: Result) -> Found | None:
        told = result["summary"].get(f"ours_over_torch_percent{suffix}")
        if told is None:
            return None
        words = f"{told['within_5_percent']} of {told['of']}, worst {told['worst']:+.1f} %"
        return words, told["within_5_percent"] == told["of"]

    return found


def no_wrong_checks(result: Result) -> Found | None:
    told = result["summary"]
    if not told.get("checks_ok"):
        return None
    wrong = len(told["checks_wrong"])
    return f"{told['checks_ok']} right, {wrong} wrong", not wrong


def none_wrong(result: Result) -> Found:
    told = result["summary"]
    bad = told["wrong"] + told.get("failed", 0)
    same = told.get("exact", told.get("equal"))
    return f"{same} equal, {told['refused']} refused by name, {bad} wrong", bad == 0


def published(result: Result) -> Found | None:
    """The best loop of ours beside the published claim, where as many devices took part.

    The target was set on a slice while all work, which is what a device of its own is like.
    """
    claim = result.get("published_claim")
    ours = [row for row in result["rows"] if "tail" in row["who"] and "speedup" in row]
    ranks = len(ours[0]["bytes_per_rank"]) if ours else 0
    if not claim or ranks != claim["devices"]:
        return None
    best = max(ours, key=lambda row: row["speedup"]["loop_vs_alone"])
    alone, working = (best["speedup"][f"loop_vs_{load}"] for load in ("alone", "working"))
    words = f"{alone:.2f}x alone, {working:.2f}x working ({best['who']})"
    return f"{words}; published {claim['speedup']:.2f}x", working >= claim["speedup"]


def over_published_schedule(result: Result) -> Found | None:
    """The best loop of ours over the published schedule's, on the same ranks."""
    speeds = {row["who"]: row["speedup"]["loop_vs_alone"] for row in _loops(result)}
    theirs = speeds.pop("published parastep", None)
    if theirs is None or not speeds:
        return None
    best = max(speeds, key=lambda who: speeds[who])
    return f"{speeds[best]:.2f}x ({best}) against {theirs:.2f}x", speeds[best] > theirs


def _loops(result: Result) -> list[Result]:
    return [row for row in result["rows"] if "speedup" in row and "model" not in row]


def slices_predicted(result: Result) -> Found | None:
    """How far rows on GPUs are from what slices of one said."""
    apart = [
        row["prediction"]["measured_over_predicted_percent"]["alone"]
        for row in _loops(result)
        if row.get("prediction")
    ]
    if not apart:
        return None
    return f"{min(apart):+.0f} % to {max(apart):+.0f} %", max(map(abs, apart)) <= 10


OVERHEADS = {
    "hooks": "Hooks above the plain pipeline",
    "replay": "Replay above as many plain evaluations",
    "replay_added": "Replay above the whole plain run, other evaluations free",
    "replay_added_quiet": "Replay above the whole plain run, rounds on a quiet host alone",
    "replay_beyond_steps": "Replay above such a run of as many scheduler steps",
}
#: Schedulers whose step combines earlier predictions: more arithmetic than one evaluation adds.
MULTISTEP = ("DPM++2M", "UniPC")


def overhead(kind: str, *, multistep: bool) -> Callable[[Result], Found | None]:
    def found(result: Result) -> Found | None:
        medians = {
            who: median
            for who, median in result["summary"].get(f"{kind}_percent", {}).items()
            if any(name in who for name in MULTISTEP) == multistep
        }
        if not medians:
            return None
        if None in medians.values():
            return "no quiet round in some rows", False
        worst = max(medians, key=lambda who: medians[who])
        return f"{medians[worst]:+.2f} % ({worst})", medians[worst] <= 2

    return found


def at_equal_depth(level: str) -> Callable[[Result], Found | None]:
    """At how many points the tail is at least the published schedule and plain steps."""

    def found(result: Result) -> Found | None:
        points = [levels(each) for each in result["summary"].get(f"equal_depth_{level}", ())]
        theirs = [ours >= other for ours, other, _ in points if other is not None]
        plain = [ours >= other for ours, _, other in points if other is not None]
        if not theirs:
            return None
        words = f"published: at {sum(theirs)} of {len(theirs)} points"
        return f"{words}; plain: at {sum(plain)} of {len(plain)}", all(theirs) and all(plain)

    return found


def margins(result: Result) -> Found | None:
    """The least margin over the published schedule on the shipped models."""
    told = result["summary"].get("margin_tail_over_parastep_db")
    if told is None:
        return None
    values = [value for degrees in told.values() for value in degrees.values()]
    return f"{min(values):+.1f} to {max(values):+.1f} dB", min(values) > 0


def beside_torch(result: Result) -> Found | None:
    """Ours over torch's context_parallel, in every case in which both ran."""
    cases = result["summary"]["cases"]
    found = [
        (each["ours_over_context_parallel"], who)
        for who, each in cases.items()
        if "ours_over_context_parallel" in each
    ]
    if not found:
        return None
    return f"{min(found)[0]:.2f}x ({min(found)[1]}) to {max(found)[0]:.2f}x", min(found)[0] >= 1


def one_gpu(result: Result) -> Found | None:
    """Best named plan of every case over one GPU."""
    cases = result["summary"]["cases"].values()
    found = [each["best_named_over_one_gpu"] for each in cases if "best_named_over_one_gpu" in each]
    if not found:
        return None
    return f"{min(found):.2f}x to {max(found):.2f}x on {result['ranks']} GPUs", None


def killed(result: Result) -> Found:
    rows = result["rows"]
    right = sum(row["ok"] for row in rows)
    return f"{right} of {len(rows)} cases", right == len(rows) > 0


def projected(result: Result) -> Found:
    told = result["summary"]
    low, high = (told[f"startrail_over_ring_gpt{x}_percent"] for x in ("_least", ""))
    mine, most = (told[f"choice_over_ring_gpt{x}_percent"] for x in ("_least", ""))
    theirs = told["published_over_ring_gpt_percent"]
    words = f"StarTrail {low:+.0f} to {high:+.0f} % (published {theirs:+.0f} %)"
    return f"{words}, choice {mine:+.0f} to {most:+.0f} %", None


def faster_than_one(result: Result) -> Found | None:
    told = result["summary"]
    if "speedup_2ranks" not in told:
        return None
    words = f"{told['speedup_2ranks']:.2f}x, ceiling {told['ceiling_2ranks']:.2f}x"
    return words, told["speedup_2ranks"] > 1


def equal_to_one_device(result: Result) -> Found | None:
    told = result["summary"]
    if not told:
        return None
    words = f"float32 {told['fp32_gradient_error']:.1e}, bfloat16 "
    words += f"{told['bf16_gradient_over_own']:.2f} of its own, {result['tokens']} tokens"
    return words, told["equal"] and result["tokens"] >= 65536


def rates(result: Result) -> Found | None:
    rows = result["rows"]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["tokens_per_second"])
    share = best["mfu_of_data_sheet"]
    mfu = "" if share is None else f", {share:.1%} of the data sheet"
    return f"{best['tokens_per_second']:.0f} tokens/s at {best['tokens']} tokens{mfu}", None


TARGETS = (
    Target("exactness", "Every scheduler exact or refused by name", "none wrong", none_wrong),
    Target("diffusion/steps", "Two ranks faster than one", "more than 1x", faster_than_one),
    Target("diffusion/steps", "Tail above the published schedule, PSNR", "> 0 dB", margins),
    Target(
        "diffusion/steps-fidelity",
        "Tail at least the published schedule and plain steps, by all pictures' mean square",
        "all",
        at_equal_depth("psnr_db"),
    ),
    Target(
        "diffusion/steps-fidelity",
        "Tail at least the published schedule and plain steps, by the pictures' average dB",
        "all",
        at_equal_depth("psnr_average_db"),
    ),
    Target("diffusion/steps-slices", "Published speed-up on slices", ">= it, working", published),
    Target(
        "diffusion/steps-slices",
        "Ours over the published schedule",
        "faster",
        over_published_schedule,
    ),
    Target(
        "diffusion/steps-gpus",
        "Ours over the published schedule",
        "faster",
        over_published_schedule,
    ),
    Target("diffusion/steps-gpus", "What slices predicted", "within 10 %", slices_predicted),
    *(
        Target(
            "diffusion/steps-overhead",
            f"{words}, worst median, {'multistep' if multistep else 'one-step'} schedulers",
            "<= 2 %",
            overhead(kind, multistep=multistep),
        )
        for multistep in (False, True)
        for kind, words in OVERHEADS.items()
    ),
    Target("attention", "Error in float64", "<= 1e-12", at_most("max_err_fp64", 1e-12)),
    Target("attention", "Gradients by finite differences", "yes", true("gradcheck_ok")),
    Target("attention", "Bytes counted = declared", "yes", true("bytes_match")),
    Target(
        "attention",
        "Ring over StarTrail, bytes, 64 ranks",
        ">= 2.8",
        at_least("ring_over_startrail_bytes_p64", 2.8),
    ),
    Target(
        "attention",
        "Ring over the best plan, bytes, 64 ranks",
        ">= 10",
        at_least("ring_over_best_bytes_p64", 10),
    ),
    Target("links", "Ring over StarTrail, 2x8", ">= 1.7", at_least("ring_over_startrail_2x8", 1.7)),
    Target("links", "Ring over auto, 2x8", ">= 2.5", at_least("ring_over_auto_2x8", 2.5)),
    Target(
        "links",
        "auto over the best named plan, worst",
        "<= 1.1",
        at_most("auto_over_best_worst", 1.1),
    ),
    Target(
        "attention peers",
        "Bytes of gradients beside peers",
        "<= 0.55",
        at_most("gradients_over_peer_worst", 0.55),
    ),
    Target("attention/kernels", "Checks against float64", "none wrong", no_wrong_checks),
    Target("attention/kernels", "Within 5 % of torch's own", "all", near_torch("")),
    Target(
        "attention/kernels",
        "The same from 16k tokens on",
        "all",
        near_torch("_from_16384_tokens"),
    ),
    Target(
        "attention/kernels",
        "Merging, of attention's time",
        "< 10 %",
        at_most("worst_merge_percent", 10, " %"),
    ),
    Target("attention/gpus", "Every plan right against float32", "yes", true("gate_ok")),
    Target("attention/gpus", "Bytes counted = declared", "yes", true("bytes_match")),
    Target("attention/gpus", "Best named plan over one GPU", "-", one_gpu),
    Target("attention/gpus", "Ours over torch's context_parallel", ">= 1x", beside_torch),
    Target("attention/gpus", "auto within 10 % of the best", "yes", true("auto_within_10pct")),
    Target(
        "attention/gpus",
        "Off from prediction, median",
        "-",
        figure("model_error_percent_median", " %"),
    ),
    Target("attention/projection", "8x8 H100 and 32 A100 over ring", "-", projected),
    Target("train", "Losses equal one rank's in float64", "1e-9", true("losses_within_1e_9")),
    Target("train", "A killed rank is named", "yes", true("killed_rank_named")),
    Target("train", "Resumed bitwise", "yes", true("resume_bitwise")),
    Target("train", "Two ranks faster than one", "more than 1x", faster_than_one),
    Target("train/slices", "64k tokens equal one device", "yes", equal_to_one_device),
    Target("train/gpus", "Rate", "-", rates),
    Target("train/gpus", "auto over the best plan", ">= 0.9", at_least("auto_over_best", 0.9)),
    Target("families", "Every model family equal or refused by name", "none wrong", none_wrong),
    Target("mesh/kill", "A killed process is named in time", "all", killed),
    Target("mesh/exchange", "Carriers agree to the bit, waits end", "yes", true("ok")),
)
