"""Step parallelism on the GPUs of one host: full-size models, published schedule, ours, guidance.

torchrun --standalone --nproc-per-node N benchmarks/steps_gpus.py --out steps.json [--dry]

The rows and the arithmetic of `steps_slices.py`, with a GPU per rank, NCCL between them and the
published frame counts. Beside each row stands what slices of one GPU say of it, from the files in
benchmarks/results: the figure of as many slices, or where none was measured the share of its
ceiling that the method reached on the nearest number of slices, times this row's ceiling. Every
model writes `OUT-MODEL.json` after every row; OUT itself has all rows and the predictions, after
every model. What does not exist for N ranks or a model is named in `skipped`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import full_size
import job
import result
import step_bench
import torch
from step_bench import CFG, CFG_STEP, SEQUENTIAL, Bench, Book

RESULTS = Path(__file__).resolve().parent / "results"
#: Multiprocessors of the slice that `Model.seconds` was measured on, and of the whole GPU.
SLICE_SMS, ALL_SMS = 14, 132
#: Of a whole GPU's evaluation time beyond the share of multiprocessors: small kernels fill less.
WHOLE = 1.2
#: Building, warming, evaluations alone and working, per model.
AROUND_S = 25.0
MODELS = ("svd", "cogvideox", "audioldm2", "flux")


class GpuBook(Book):
    """The result of a model, with what slices predicted for each row."""

    def __init__(self, bench: Bench):
        notes = ["one device: a GPU", "prediction: from slices of one GPU, see its `how`"]
        super().__init__(bench, "diffusion/steps-gpus", notes)
        self.result["command"] = job.command(bench.ranks)
        self.result["ranks"] = bench.ranks

    def _entry(self, row: step_bench.Row, repeats: list[dict]) -> dict:
        entry = super()._entry(row, repeats)
        model, ranks = self.bench.model.name, self.bench.ranks
        entry["prediction"] = prediction(model, ranks, row.who, entry["ceiling"])
        if entry["prediction"]:
            against(entry["prediction"], entry["speedup"])
        return entry


def prediction(
    model: str, ranks: int, who: str, ceiling: float, folder: Path = RESULTS
) -> dict[str, Any] | None:
    """What slices say of a row: times one device, in the loop; None where nothing was measured."""
    found = []
    for path in folder.glob(f"steps-slices-{model}-*.json"):
        told = json.loads(path.read_text())
        row = next((r for r in told["rows"] if r["who"] == who), None)
        if row is not None:
            count = int(path.stem.split("-")[-2])
            found.append((abs(count - ranks), -count, path.name, told, row))
    if not found:
        return None
    apart, count, name, told, row = min(found, key=lambda each: each[:3])
    speed = told["summary"][who]
    measured = {load: speed[f"loop_vs_{load}"] for load in ("alone", "working")}
    base = {"file": name, "slices": -count, "shape": told["shape"], "ceiling": row["ceiling"]}
    if not apart:
        return {**base, "how": "as many slices", "loop": measured}
    shares = {load: value / row["ceiling"] for load, value in measured.items()}
    loop = {load: share * ceiling for load, share in shares.items()}
    return {**base, "how": "share of the ceiling on other slices", "share": shares, "loop": loop}


def against(told: dict[str, Any], speedup: dict[str, float]) -> None:
    """Put the measured figure beside the prediction: percent by which it is above."""
    told["measured_over_predicted_percent"] = {
        load: 100 * (speedup[f"loop_vs_{load}"] / told["loop"][load] - 1)
        for load in ("alone", "working")
    }


# ---- the run -------------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> None:
    device = job.local_device(options.dry)
    words = job.device_words(device, options.ranks)
    whole = result.begin("diffusion/steps-gpus", words, options.commit, ranks=options.ranks)
    whole |= {"command": job.command(options.ranks), "skipped": skipped(options)}
    if options.rank == 0:
        announce(options)
    for name in options.models:
        done, why = one_model(options, name, device)
        if done is None:
            whole["skipped"].append({"model": name, "who": "all", "why": why})
        else:
            whole["rows"] += [{"model": name, **row} for row in done["rows"]]
            whole["summary"][name] = summary(done)
        if options.rank == 0:
            result.write(options.out, whole)


def one_model(
    options: argparse.Namespace, name: str, device: torch.device
) -> tuple[dict | None, str]:
    """A model's result, or why there is none; its memory is given back."""
    found, why = measured(Bench(of_model(options, name), device))
    # Only now does nothing hold the pipeline but itself.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found, why


def measured(bench: Bench) -> tuple[dict | None, str]:
    """The result of a bench's model, or why there is none."""
    found, why = None, too_large(bench)
    if not why:
        bench.prepare()
        book = GpuBook(bench)
        if step_bench.measure(bench, book):
            found = book.result
        else:
            why = f"the sequential run does not fit {bench.options.budget_s:g} s"
    if why:
        bench.say(f"skipped: {bench.model.name}: {why}")
    for mesh in (*bench.meshes.values(), bench.world):
        mesh.close()
    return found, why


def of_model(options: argparse.Namespace, name: str) -> argparse.Namespace:
    """The options of one model: its file, the time it may take from now on, its own shape."""
    own = copy.copy(options)
    own.model, own.started = name, time.time()
    own.out = options.out.with_name(f"{options.out.stem}-{name}.json")
    model = full_size.MODELS[name](tiny=options.dry)
    # Slices take fewer frames to be done in time; here the published number fits.
    own.frames = options.frames or (None if options.dry else model.reference.frames)
    return own


def too_large(bench: Bench) -> str:
    """Why a model's weights leave no room on this rank's GPU, "" if they do."""
    if bench.device.type != "cuda":
        return ""
    need = bench.model.parameters * bench.dtype.itemsize
    room = torch.cuda.get_device_properties(bench.device).total_memory
    if need < 0.6 * room:
        return ""
    return f"weights of {need / 2**30:.0f} GiB on a GPU of {room / 2**30:.0f} GiB"


def skipped(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rows that do not exist for these ranks, by name."""
    found = []
    for name in options.models:
        model = full_size.MODELS[name](tiny=options.dry)
        for who in (CFG, CFG_STEP):
            why = step_bench.absent(model, options.ranks, who)
            if why:
                found.append({"model": name, "who": who, "why": why})
    return found


def announce(options: argparse.Namespace) -> None:
    """Estimated seconds of every model, before anything starts."""
    print(f"{options.ranks} ranks, budget {options.budget_s:g} s a model", flush=True)
    for each in skipped(options):
        print(f"  skipped: {each['model']}, {each['who']}: {each['why']}", flush=True)
    if options.dry:
        return
    for name in options.models:
        own = of_model(options, name)
        model, shape = step_bench.chosen(own)
        one = model.seconds * step_bench.work(model, shape) * SLICE_SMS / ALL_SMS * WHOLE
        total = AROUND_S + shape.steps * one
        for row in step_bench.rows(model, own):
            count = row.steps if row.who == CFG else len(step_bench.sizes_of(row, model))
            total += row.repeats * count * one * (0.6 if row.plan.cfg.degree == 2 else 1.1)
        words = f"{shape.steps} steps of about {one:.2f} s, all rows about {total:.0f} s"
        print(f"  {name:10} {words}", flush=True)


def summary(done: dict[str, Any]) -> dict[str, Any]:
    """Per row times one GPU in the loop and end to end, its ceiling, and the slices' prediction."""
    found = {"published_claim": done["published_claim"]}
    for row in done["rows"]:
        if row["who"] == SEQUENTIAL:
            continue
        speed, told = row["speedup"], row["prediction"]
        found[row["who"]] = {
            "loop": speed["loop_vs_alone"],
            "end_to_end": speed["end_to_end_vs_alone"],
            "loop_vs_working": speed["loop_vs_working"],
            "ceiling": row["ceiling"],
            "depth": row["depth_windows"],
            "predicted_loop": told and told["loop"],
            "measured_over_predicted_percent": told and told["measured_over_predicted_percent"],
        }
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = job.parser(__doc__, budget_s=165)
    made.add_argument("--models", type=_models, default=list(MODELS), help=",".join(MODELS))
    step_bench.add_options(made)
    options = made.parse_args(arguments)
    options.ranks = int(os.environ.get("WORLD_SIZE", "2"))
    options.rank = int(os.environ.get("RANK", "0"))
    return options


def _models(text: str) -> list[str]:
    words = text.split(",")
    unknown = [word for word in words if word not in full_size.MODELS]
    if unknown:
        known = ", ".join(full_size.MODELS)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {known}")
    return words


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(job.started(parse()))
    sys.stdout.flush()
    # Communicators of many meshes are left to the end of the process.
    os._exit(0)
