"""Steps in parallel on the shipped models: two ranks' speed, and fidelity at equal depth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stretto.bench import fidelity, speed
from stretto.bench import result as document
from stretto.bench.fidelity import Setting
from stretto.bench.result import Keep, Say
from stretto.bench.speed import Race
from stretto.diffusion.provenance import load_now

#: Keys of the summary, by the row that they come from.
_FIDELITY = {
    "psnr_parastep_db": "parastep",
    "psnr_tail_db": "tail",
    "psnr_calibrated_db": "calibrated",
    "psnr_fewer_steps_db": "fewer steps",
}
_NOTES = (
    "speed-up: median of sequential on one rank of one thread, over the median of the row",
    "ceiling: steps / depth, a half guidance batch at its measured cost; ideal: at one half",
    "a batch of pictures stands in for a larger denoiser; pictures alone could be shared out",
    "PSNR: average over the pictures (pooled_db: of their pooled squared error), range 2.0, "
    "before clipping; against the sequential run of as many steps as the plan",
    "fidelity: on six classes, and seeds, that no calibration saw; calibrated on the four others",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured; `race.repeats` is set by the caller of `run`."""

    race: Race
    setting: Setting


#: 12 guided pictures are 0.25 s per evaluation on one thread of a 2026 server core; 24 steps keep
#: a round of all methods below a minute.
FULL = Size(Race(steps=24, images=12, repeats=5), Setting())
QUICK = Size(
    Race(steps=5, images=1, repeats=1),
    Setting(steps=6, images=2, calibration_images=1, degrees=(2, 4)),
)


def run(
    size: Size, *, repeats: int = 5, say: Say | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """The document result/1: rows of both parts and the summary. Starts two ranks, twice.

    First what is timed, alone on the machine; then fidelity, whose rows `keep` gets one by one.
    """
    race = replace(size.race, repeats=repeats)
    on_note, keep = document.following(say), keep or (lambda found: None)
    device = f"2 ranks of 1 thread, {document.cpu_name()}"
    found = document.begin("diffusion/steps", device, repeats=repeats, notes=list(_NOTES))
    began = time.perf_counter()
    timed, facts = speed.measure(race, on_note)
    found["load"]["after speed"] = load_now()
    found["seconds"] = {"speed": time.perf_counter() - began}
    found |= facts

    def fill(drawn: list[dict[str, Any]]) -> None:
        found["rows"] = [*timed, *drawn]
        found["summary"] = {**speed_summary(timed), **fidelity_summary(drawn)}
        keep(found)

    fill([])
    fill(fidelity.measure(size.setting, on_note=on_note, keep=fill))
    found["seconds"]["total"] = time.perf_counter() - began
    document.end(found)
    return found


def speed_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speed-ups of step2 without guidance (plain keys), cfg2 and guided step2, with ceilings.

    `machine_2ranks`: what two ranks reach that have nothing to do with each other, in sequential
    runs per sequential time; below 2 where they share memory or other work takes the cores.
    `of_reachable`: the speed-up over the ceiling scaled by that.
    """
    rows_of = {(row["who"], row["guidance"]): row for row in rows}
    keys = {
        "": ("step2 tail", False),
        "_cfg2": ("cfg2", True),
        "_step2_guided": ("step2 tail", True),
    }
    found: dict[str, Any] = {}
    for suffix, key in keys.items():
        row = rows_of[key]
        found[f"speedup_2ranks{suffix}"] = row["speedup"]
        found[f"ceiling_2ranks{suffix}"] = row["ceiling"]
        found[f"ceiling_ideal_2ranks{suffix}"] = row["ceiling_ideal"]
        found[f"of_ceiling{suffix}"] = row["of_ceiling"]
        alone = rows_of["independent runs", row["guidance"]]
        found[f"of_reachable{suffix}"] = row["of_ceiling"] / alone["speedup"]
        found[f"bytes_per_rank{suffix}"] = max(row["bytes_sent"])
    together = rows_of["independent runs", False]
    threads = rows_of["sequential, 2 threads", False]
    found["machine_2ranks"] = 2 * together["speedup"]
    found["speedup_2threads"] = threads["speedup"]
    return found


def fidelity_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """PSNR by method, model and degree, and the margins between methods, all in dB.

    Of the rows there are: a margin appears when both its methods were measured.
    """
    found: dict[str, Any] = {key: _by_task(rows, {who}) for key, who in _FIDELITY.items()}
    others = {row["who"] for row in rows if row["who"].startswith("fewer steps")}
    found["psnr_best_fewer_steps_db"] = _by_task(rows, others)
    found["psnr_worst_item_calibrated_db"] = _by_task(rows, {"calibrated"}, "psnr_worst_item_db")
    margins = (
        ("calibrated", "parastep"),
        ("calibrated", "fewer_steps"),
        ("calibrated", "best_fewer_steps"),
        ("tail", "parastep"),
    )
    for ours, theirs in margins:
        x, y = found[f"psnr_{ours}_db"], found[f"psnr_{theirs}_db"]
        found[f"margin_{ours}_over_{theirs}_db"] = {
            model: {p: x[model][p] - y[model][p] for p in x[model].keys() & y[model].keys()}
            for model in x.keys() & y.keys()
        }
    floors = {row["model"]: row["psnr_db"] for row in rows if row["who"] == "noise floor"}
    return found | {"noise_floor_db": floors}


def _by_task(
    rows: Sequence[dict[str, Any]], who: set[str], key: str = "psnr_db"
) -> dict[str, dict[str, float]]:
    """The best of `who`, as {model: {"p4": dB}}."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["who"] in who:
            of_model = found.setdefault(row["model"], {})
            name = f"p{row['degree']}"
            of_model[name] = max(row[key], of_model.get(name, row[key]))
    return found
