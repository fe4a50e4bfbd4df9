"""A GPT trained on one long sequence over the GPUs of one host: ring, usp and auto.

torchrun --standalone --nproc-per-node N benchmarks/train_gpus.py --out train.json \\
    [--cluster attention-nccl.yaml] [--model gpt-large] [--tokens 131072] [--dry]

bfloat16 on float32 masters, weights sharded over all ranks (fully_shard), activations recomputed
outside attention, AdamW, one sequence a step out of one long document, `--steps` steps. Two lengths
tried first, a step each after a warming one, give memory and seconds by length: the length trained
is the longest power of two that fits the memory and, with all plans, `--budget-s`; which of the two
was the limit is in the result. `auto` is chosen on `--cluster`, which `attention_gpus.py` writes.
Every plan starts from the same weights and sees the same text. MFU counts forward and backward
without recomputation, over the data sheet's rate of the GPU and over what a matrix product reaches.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import job
import result
import torch
from job import median, slowest
from train_slices import write_document

from stretto.cluster.model import Cluster
from stretto.cost.train import estimate
from stretto.errors import StrettoError
from stretto.mesh.join import init_mesh
from stretto.mesh.mesh import Mesh
from stretto.plan.context import Context, named_points
from stretto.plan.model import Plan
from stretto.train import shards
from stretto.train.choice import arch_of, best_context
from stretto.train.job import Job, attention_bound, build, matmul_rate
from stretto.train.loop import Trainer
from stretto.train.presets import PRESETS, task_of
from stretto.train.recipe import Descent, Recipe
from stretto.workload.train import Training

TIMEOUT_S = 120.0
#: Steps whose times do not count: allocators fill.
WARMING = 2
#: Bytes of a parameter's master, gradient and two moments, and its bfloat16 copy when gathered.
STATE_BYTES = 16
#: Part of the memory that a length may be expected to take.
FILL = 0.8
#: bfloat16 FLOP/s of a data sheet (dense), by what the GPU's name holds.
SHEETS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


class Bench(job.Rank):
    """One rank: the model once, a trainer per plan, and what rank 0 keeps."""

    def __init__(self, options: argparse.Namespace):
        device, ranks = job.local_device(options.dry), int(os.environ["WORLD_SIZE"])
        world = init_mesh(plan_of(Context(ring=ranks)), device=device, timeout_s=600.0)
        super().__init__(options, world)
        self.dtype = "float32" if options.dry else "bfloat16"
        self.text = document(self)
        words = job.device_words(device, self.ranks)
        self.result = result.begin("train/gpus", words, options.commit, ranks=self.ranks)
        self.result |= {"command": job.command(self.ranks), "skipped": [], "model": options.model}
        # The first product also loads the library, which may take all the time there is for them.
        matmul_rate(device, self.dtype)
        self.peak = min(self.collect(matmul_rate(device, self.dtype)))
        self.result["matmul_flops"] = self.peak
        self.shape = PRESETS[options.model].shape

    def build(self) -> None:
        """The sharded model, under no plan, and a copy of its first weights on the host."""
        recipe = self.recipe(1024 if self.device.type == "cuda" else 64, 1)
        task = task_of(recipe)
        self.model = task.model()
        made = build(task, self.model, Job(recipe=recipe, plan=self.plan_alone()), self.world)
        self.parameters = made.parameters
        self.first = [shards.local(p).detach().cpu().clone() for p in self.model.parameters()]
        self.say(f"{self.options.model}: {self.parameters / 1e9:.2f} G parameters, built")

    def plan_alone(self) -> Plan:
        return plan_of(Context(ring=self.ranks))

    def recipe(self, tokens: int, steps: int) -> Recipe:
        return Recipe(
            model=self.options.model,
            data=str(self.text),
            tokens=tokens,
            sequences=1,
            steps=steps,
            dtype=self.dtype,
            recompute=True,
            descent=Descent(warmup=2, rate=3e-4),
        )

    def write(self) -> None:
        if self.rank == 0:
            self.result["summary"] = summary(self.result["rows"])
            result.write(self.options.out, self.result)

    def skip(self, who: str, why: str) -> None:
        self.say(f"skipped: {who}: {why}")
        self.result["skipped"].append({"who": who, "why": why})

    def run(self, context: Context, tokens: int, steps: int, carrier: str) -> dict[str, Any]:
        """Train from the first weights; milliseconds of the slowest rank, losses, memory."""
        if carrier == "symmetric":
            # A kernel that loads behind one that waits on the device would wait for ever.
            self.train(context, tokens, 1, "nccl")
        found = self.train(context, tokens, steps, carrier)
        every = self.collect(found)
        return {
            "plan": context.short(),
            "tokens": tokens,
            "carrier": carrier,
            "ms": slowest([rank["ms"] for rank in every]),
            "losses": found["losses"],
            "norms": found["norms"],
            "flops": found["flops"],
            "peak_bytes": max(rank["peak_bytes"] for rank in every),
        }

    def train(self, context: Context, tokens: int, steps: int, carrier: str) -> dict[str, Any]:
        plan, recipe = plan_of(context), self.recipe(tokens, max(steps, 2))
        self.restore()
        self.free()
        carried = "auto" if carrier == "gloo" else carrier
        more = {"device": self.device, "timeout_s": TIMEOUT_S, "carrier": carried}
        with closing(init_mesh(plan, **more)) as mesh, attention_bound(self.model, plan, mesh):
            trainer = Trainer(task_of(recipe), recipe, plan, self.model, mesh)
            told = self.steps(trainer, mesh, steps)
            del trainer
        self.free()
        return told

    def steps(self, trainer: Trainer, mesh: Mesh, steps: int) -> dict[str, Any]:
        told: dict[str, Any] = {"ms": [], "losses": [], "norms": []}
        for _ in range(steps):
            self.barrier()
            kept: list[Any] = []
            seconds = result.timed(lambda kept=kept: kept.append(trainer.step()), self.device)
            told["ms"].append(1e3 * seconds)
            told["losses"].append(kept[0].loss)
            told["norms"].append(kept[0].norm)
        told["flops"] = kept[0].flops
        told["peak_bytes"] = 0
        if self.device.type == "cuda":
            told["peak_bytes"] = torch.cuda.max_memory_allocated()
        return told

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, first in zip(self.model.parameters(), self.first, strict=True):
                shards.local(parameter).copy_(first)
                parameter.grad = None

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def plan_of(context: Context) -> Plan:
    return Plan(kind="train", cp=context)


def document(bench: job.Rank) -> Path:
    """One long document, the same for all ranks of this host; rank 0 writes it."""
    made = tempfile.mkdtemp(prefix="train-gpus-") if bench.rank == 0 else ""
    folder = Path(bench.collect(made)[0]) / "text"
    if bench.rank == 0:
        write_document(folder)
    bench.barrier()
    return folder


# ---- lengths -------------------------------------------------------------------------------------


def longest(bench: Bench, plans: int) -> int:
    """The longest power of two that memory and the budget allow, from two lengths tried."""
    short = 64 * bench.ranks if bench.options.dry else 2**14 * max(1, bench.ranks // 2)
    tried = []
    for tokens in (short, 2 * short):
        found = bench.run(Context(ring=bench.ranks), tokens, 2, bench.options.carriers[0])
        tried.append((tokens, found["peak_bytes"], found["ms"][-1] / 1e3))
        bench.say(f"tried {tokens}: {found['peak_bytes'] / 2**30:.1f} GiB, {tried[-1][2]:.2f} s")
    room = math.inf
    if bench.device.type == "cuda":
        room = FILL * torch.cuda.get_device_properties(bench.device).total_memory
    left = bench.left_s() if bench.rank == 0 else 0.0
    left = max(bench.collect(left))
    by_memory, by_time = limits(tried, room, left, plans * (bench.options.steps + 1))
    tokens = max(2 * short, min(by_memory, by_time, bench.options.most))
    bench.result["length"] = {
        "tried": tried,
        "by_memory": by_memory,
        "by_time": by_time,
        "trained": tokens,
        "limit": limit_of(tokens, by_memory, by_time),
    }
    bench.say(f"memory allows {by_memory} tokens, {left:.0f} s allow {by_time}: {tokens}")
    return tokens


def limit_of(tokens: int, by_memory: int, by_time: int) -> str:
    """What kept the length from being longer."""
    known = {by_time: "the budget of seconds", by_memory: "memory"}
    return known.get(tokens, "--most, or the least that is tried")


def limits(
    tried: Sequence[tuple[int, int, float]], room: float, left_s: float, steps: int
) -> tuple[int, int]:
    """Longest powers of two by memory and by time.

    Bytes are taken to grow by tokens; seconds by tokens and their square, through the points tried.
    """
    (n, bytes_n, s_n), (m, bytes_m, s_m) = tried
    each = max((bytes_m - bytes_n) / (m - n), 0.0)
    square = max((s_m / m - s_n / n) / (m - n), 0.0)
    linear = max(s_m / m - square * m, 0.0)
    by_memory = by_time = m
    while each and bytes_m + each * (2 * by_memory - m) <= room and by_memory < 2**24:
        by_memory *= 2
    while steps * (2 * by_time * (linear + square * 2 * by_time)) <= left_s and by_time < 2**24:
        by_time *= 2
    return by_memory if each else 2**24, by_time


# ---- plans and rows ------------------------------------------------------------------------------


def chosen(bench: Bench, tokens: int) -> dict[str, Context]:
    """ring, usp of the highest degree that exists, and auto on the cluster given."""
    points = named_points(bench.ranks, bench.shape.heads, bench.shape.kv_heads)
    found = {"ring": points["ring"]}
    usps = [name for name in points if name.startswith("usp")]
    if usps:
        found[usps[-1]] = points[usps[-1]]
    else:
        bench.skip("usp", f"{bench.ranks} ranks allow no degree of it between 1 and all")
    recipe = bench.recipe(tokens, bench.options.steps)
    context, origin = best_context(recipe, bench.ranks, 1, bench.options.cluster)
    bench.result["auto"] = {"plan": context.short(), "note": origin.note}
    found["auto"] = context
    return found


def row_of(bench: Bench, name: str, context: Context, found: dict[str, Any]) -> dict[str, Any]:
    """Rates of a run, and the model's figure beside it."""
    timed = found["ms"][WARMING:] or found["ms"]
    seconds = median(timed) / 1e3
    per_gpu = found["flops"] / seconds / bench.ranks
    sheet = next((rate for key, rate in SHEETS.items() if key in name_of(bench)), None)
    return {
        "who": f"{name}/{found['carrier']}",
        "name": name,
        **found,
        "median_ms": 1e3 * seconds,
        "spread": result.spread(timed),
        "steps": len(found["ms"]),
        "tokens_per_second": found["tokens"] / seconds,
        "tflops_per_gpu": per_gpu / 1e12,
        "mfu_of_data_sheet": sheet and per_gpu / sheet,
        "mfu_of_matmul": per_gpu / bench.peak,
        **predicted(bench, context, found["tokens"], 1e3 * seconds),
    }


def name_of(bench: Bench) -> str:
    return result.device_name(bench.device)


def predicted(bench: Bench, context: Context, tokens: int, ms: float) -> dict[str, Any]:
    """What the cost model says of a step on the cluster given; it leaves out weights' messages."""
    recipe = bench.recipe(tokens, 1)
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[bench.dtype]
    more = {"dtype": dtype, "state_bytes": STATE_BYTES, "recompute": True}
    training = Training.of(arch_of(recipe), tokens, **more)
    try:
        told = estimate(training, Cluster.read(bench.options.cluster), plan_of(context))
    except StrettoError as error:
        return {"predicted_ms": None, "no_prediction": str(error).splitlines()[0]}
    return {
        "predicted_ms": 1e3 * told.seconds,
        "predicted_bytes": told.memory.total,
        "model_error_percent": 100 * (ms / (1e3 * told.seconds) - 1),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates by plan, `auto` beside the best, and whether all plans began with the same loss."""
    if not rows:
        return {}
    best = max(rows, key=lambda row: row["tokens_per_second"])
    autos = [row for row in rows if row["name"] == "auto"]
    first = [row["losses"][0] for row in rows]
    told = {
        row["who"]: {
            "tokens": row["tokens"],
            "tokens_per_second": row["tokens_per_second"],
            "mfu_of_data_sheet": row["mfu_of_data_sheet"],
            "mfu_of_matmul": row["mfu_of_matmul"],
        }
        for row in rows
    }
    fastest = max((row["tokens_per_second"] for row in autos), default=None)
    return {
        "rates": told,
        "best": best["who"],
        "auto_over_best": fastest and fastest / best["tokens_per_second"],
        "first_loss_spread": (max(first) - min(first)) / abs(first[0]),
        "losses_fall": all(row["losses"][-1] < row["losses"][0] for row in rows),
    }


def room_for_states(bench: Bench) -> str:
    """Why a model's states leave no room, "" if they do."""
    if bench.device.type != "cuda":
        return ""
    count = bench.shape.multiplied + bench.shape.vocabulary * bench.shape.width
    need = STATE_BYTES * count / bench.ranks
    room = torch.cuda.get_device_properties(bench.device).total_memory
    if need < 0.7 * room:
        return ""
    return f"states of {need / 2**30:.0f} GiB a rank on a GPU of {room / 2**30:.0f} GiB"


def main(options: argparse.Namespace) -> None:
    bench = Bench(options)
    why = room_for_states(bench)
    if why:
        bench.skip(options.model, why)
        bench.write()
        return
    bench.say(f"{bench.result['device']}, {options.model}, budget {options.budget_s:g} s")
    bench.build()
    tokens = options.tokens or longest(bench, 3 * len(options.carriers))
    for name, context in chosen(bench, tokens).items():
        for carrier in options.carriers:
            known = bench.result["rows"]
            expected = sum(known[-1]["ms"]) / 1e3 if known else 0.0
            if not bench.may_run(f"{name}/{carrier}", 1.1 * expected):
                bench.skip(f"{name}/{carrier}", "past the budget")
                continue
            found = bench.run(context, tokens, options.steps, carrier)
            bench.result["rows"].append(row_of(bench, name, context, found))
            bench.say(line(bench.result["rows"][-1]))
            bench.write()
    bench.write()
    bench.say("done")
    bench.barrier()
    bench.world.close()


def line(row: dict[str, Any]) -> str:
    rates = f"{row['tokens_per_second']:.0f} tokens/s, {row['tflops_per_gpu']:.0f} TFLOP/s a GPU"
    losses = f"loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
    memory = f"{row['peak_bytes'] / 2**30:.1f} GiB"
    return f"{row['who']:20} {row['median_ms']:9.1f} ms, {rates}, {memory}, {losses}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = job.parser(__doc__, budget_s=480)
    made.add_argument("--model", default=None, help="a gpt preset; gpt-large, dry gpt-tiny")
    made.add_argument("--tokens", type=int, help="of a sequence; by default the longest that fits")
    made.add_argument("--most", type=int, help="never longer than that")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--carriers", type=lambda text: text.split(","), default=None)
    made.add_argument("--cluster", default=None, help="file or preset that auto chooses on")
    options = made.parse_args(arguments)
    options.model = options.model or ("gpt-tiny" if options.dry else "gpt-large")
    options.carriers = ["gloo"] if options.dry else options.carriers or ["nccl"]
    options.most = options.most or (1024 if options.dry else 2**21)
    options.cluster = options.cluster or ("cpu-x2" if options.dry else "h100-x8")
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(job.started(parse()))
    sys.stdout.flush()
    # Communicators of many meshes are left to the end of the process.
    os._exit(0)
