"""Training one long sequence on slices of one GPU, beside one device in the same job.

python benchmarks/train_slices.py --out train-slices.json [--tokens 65536] [--ranks 4] [--dry]

The parent starts the MPS daemon and one process per rank, each on an equal share of the GPU:
weights are sharded over gloo, attention moves its blocks through symmetric memory. Rank 0 trains
the whole sequence alone first, in float32 and bfloat16; then all ranks train it under every plan.

gradients   of the first step, against float32 on one device, relative L2 over all parameters:
            float32 within 1e-5, bfloat16 within 1.5 times one device's own bfloat16 error
losses      of every step, against one device in the same dtype
ms          of a step; one device is one slice, the others asleep

The text is one document (the standard library's sources laid end to end), so attention really
spans the sequence. `--dry` walks the same code on the CPU with a tiny model, over gloo alone.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import job
import mps
import result
import torch
import torch.distributed as dist

from stretto.mesh.engine import torch_mesh
from stretto.mesh.join import init_mesh
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import Mesh
from stretto.plan.context import Context, named_points
from stretto.plan.model import Plan
from stretto.train import shards
from stretto.train.job import Job, attention_bound, build
from stretto.train.loop import Trainer
from stretto.train.presets import PRESETS, task_of
from stretto.train.recipe import Descent, Recipe

#: A wait for rank 0's work alone must outlast it.
TIMEOUT_S = 1200.0
DTYPES = ("float32", "bfloat16")
#: Allowed: relative L2 of float32 gradients; bfloat16 over one device's own error.
FLOAT32_WITHIN, BFLOAT16_WITHIN = 1e-5, 1.5
#: Characters of source text in the one document, at most.
_TEXT_BYTES = 4_000_000


# ---- the parent --------------------------------------------------------------------------------


def launch(options: argparse.Namespace) -> int:
    """Write the text, start the daemon and the ranks, and end all of it whatever happens."""
    with tempfile.TemporaryDirectory(prefix="train-slices-") as folder:
        write_document(Path(folder) / "text")
        with nullcontext({}) if options.dry else mps.daemon() as environment:
            ranks = start(options, environment, folder)
            try:
                return wait(ranks, options.started + options.budget_s)
            finally:
                for process in ranks:
                    if process.poll() is None:
                        process.kill()
                    process.wait()


def write_document(folder: Path) -> None:
    """One file of source text: one long document."""
    folder.mkdir()
    parts, size = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(file.read_bytes())
        size += len(parts[-1])
        if size > _TEXT_BYTES:
            break
    (folder / "all.py").write_bytes(b"\n".join(parts)[:_TEXT_BYTES])


def start(options: argparse.Namespace, environment: dict, folder: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(__file__).resolve().parents[1] / "src")
    shared = {
        **os.environ,
        **environment,
        **({} if options.dry else mps.slice_environment(options.ranks)),
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "CUDA_VISIBLE_DEVICES": "" if options.dry else "0",
        "BENCHMARK_STARTED": str(options.started),
        "BENCHMARK_FOLDER": folder,
    }
    command = [sys.executable, __file__, *sys.argv[1:]]
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(options.ranks)
    ]


def wait(ranks: Sequence[subprocess.Popen], until: float) -> int:
    """0 when all ranks ended well; 1 at the first that did not, or when time is up."""
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks) or time.time() > until:
            # The others may be about to say which rank they miss.
            time.sleep(5)
            return 1
        time.sleep(0.2)
    return int(any(process.returncode for process in ranks))


# ---- a rank --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What training under one plan gave, on this rank."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    peak_bytes: int


class Bench(job.Rank):
    """One rank of the job."""

    def __init__(self, options: argparse.Namespace):
        device = torch.device("cpu" if options.dry else "cuda:0")
        gloo = {"device": device, "timeout_s": TIMEOUT_S, "carrier": "gloo"}
        super().__init__(options, init_mesh(plan_of(Context(ring=options.ranks)), **gloo))
        self.gloo = gloo
        self.lone = LocalWorld(plan_of(Context()).sizes, device=device).mesh(0)
        # On every rank, also those that never train alone: torch counts groups.
        self.lone_row = torch_mesh(self.lone)
        self.folder = Path(os.environ["BENCHMARK_FOLDER"])
        words = "gloo ranks on a CPU (dry)" if options.dry else mps_words(options.ranks)
        self.found = result.begin("train/slices", words, options.commit, tokens=options.tokens)
        self.found |= {"model": options.model, "ranks": options.ranks, "skipped": []}
        self.own_error = math.nan

    def recipe(self, dtype: str) -> Recipe:
        return Recipe(
            model=self.options.model,
            data=str(self.folder / "text"),
            tokens=self.options.tokens,
            sequences=1,
            steps=self.options.steps,
            dtype=dtype,
            descent=Descent(warmup=1, rate=3e-4),
        )

    def run(self) -> None:
        for dtype in DTYPES:
            row = self.on_rank_0(lambda dtype=dtype: self.train_alone(dtype))
            self.keep({"who": alone(dtype), **row})
        self.own_error = self.on_rank_0(self.error_of_one)
        for name, context in plans(self.options).items():
            for dtype in DTYPES:
                who = f"{name}, {dtype}"
                if self.may_run(who, self.expected_s(dtype)):
                    self.keep({"who": who, **self.train_together(context, dtype)})
                else:
                    self.found["skipped"].append({"who": who, "why": "past the budget"})
        self.write()

    def keep(self, row: dict[str, Any]) -> None:
        self.found["rows"].append(row)
        self.say(f"{row['who']}: {statistics.median(row['ms']):.0f} ms, {shown(row)}")
        self.write()

    def write(self) -> None:
        self.found["summary"] = summary(self.found["rows"], self.own_error)
        if self.rank == 0:
            result.write(self.options.out, self.found)

    def expected_s(self, dtype: str) -> float:
        """Seconds of a plan: a step to load kernels, one for gradients, and those that count."""
        one = next(r for r in self.found["rows"] if r["who"] == alone(dtype))
        steps = self.options.steps + 2
        return 5.0 + 1.3e-3 * steps * statistics.median(one["ms"]) / self.options.ranks

    # ---- one device --------------------------------------------------------------------------

    def train_alone(self, dtype: str) -> dict[str, Any]:
        run = self.steps(plan_of(Context()), self.lone, dtype, keep_gradient=True)
        return row_of(run, dtype) | {"peak_bytes": [run.peak_bytes]}

    def reference(self, dtype: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"{dtype}.pt", mmap=True)

    def error_of_one(self) -> float:
        """Relative L2 of one device's bfloat16 gradients against its float32 ones."""
        exact, rounded = self.reference("float32"), self.reference("bfloat16")
        pairs = [(rounded[name], whole) for name, whole in exact.items()]
        return math.sqrt(squares([a - b for a, b in pairs]) / squares([b for _, b in pairs]))

    # ---- all ranks ---------------------------------------------------------------------------

    def train_together(self, context: Context, dtype: str) -> dict[str, Any]:
        plan = plan_of(context)
        # Every kernel is loaded while messages go through the host: one that loads behind a
        # kernel that waits on the device would wait for ever.
        with closing(init_mesh(plan, **self.gloo)) as mesh:
            self.steps(plan, mesh, dtype, steps=1)
        carrier = "gloo" if self.options.dry else "symmetric"
        with closing(init_mesh(plan, **{**self.gloo, "carrier": carrier})) as mesh:
            run = self.steps(plan, mesh, dtype, compare_gradient=True)
        every = self.collect({"ms": [1e3 * s for s in run.seconds], "peak": run.peak_bytes})
        one = self.collect(run.losses)[0]
        row = row_of(run, dtype) | {
            "ms": job.slowest([rank["ms"] for rank in every]),
            "peak_bytes": [rank["peak"] for rank in every],
            "plan": repr(plan),
            "carrier": carrier,
        }
        row["ranks_agree"] = all(losses == one for losses in self.collect(run.losses))
        one_device = next(r for r in self.found["rows"] if r["who"] == alone(dtype))
        pairs = zip(run.losses, one_device["losses"], strict=True)
        row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
        row["gradient_error"] = self.gradient_error
        row["gradient_over_own"] = self.gradient_error / self.own_error
        row["faster"] = statistics.median(one_device["ms"]) / statistics.median(row["ms"])
        return row

    def steps(
        self,
        plan: Plan,
        mesh: Mesh,
        dtype: str,
        *,
        steps: int | None = None,
        keep_gradient: bool = False,
        compare_gradient: bool = False,
    ) -> Run:
        """Train; before it, look at the gradients of the first step."""
        recipe = self.recipe(dtype)
        task = task_of(recipe)
        model = task.model()
        if self.device.type == "cuda":
            # All ranks share one memory: what rank 0 kept from training alone is theirs too.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with attention_bound(model, plan, mesh):
            over = self.lone_row if mesh is self.lone else None
            trainer = build(task, model, Job(recipe=recipe, plan=plan), mesh, over)
            if keep_gradient or compare_gradient:
                trainer.backward(trainer.draw())
                self.look_at_gradients(trainer, dtype, write=keep_gradient)
                trainer.optimizer.zero_grad()
            done = [self.timed(trainer) for _ in range(steps or recipe.steps)]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        events, seconds = zip(*done, strict=True)
        return Run([e.loss for e in events], [e.norm for e in events], list(seconds), peak)

    def timed(self, trainer: Trainer) -> tuple[Any, float]:
        result.synchronise(self.device)
        began = time.perf_counter()
        event = trainer.step()
        result.synchronise(self.device)
        return event, time.perf_counter() - began

    def look_at_gradients(self, trainer: Trainer, dtype: str, *, write: bool) -> None:
        """Write whole gradients, or compare this rank's shards with float32 on one device."""
        named = [(n, p) for n, p in trainer.model.named_parameters() if p.grad is not None]
        if write:
            whole = {name: shards.local(p.grad).cpu().clone() for name, p in named}
            torch.save(whole, self.folder / f"{dtype}.pt")
            return
        exact = self.reference("float32")
        parts = [(shards.local(p.grad).cpu(), shards.part_of(exact[n], p)) for n, p in named]
        sums = [squares([a - b for a, b in parts]), squares([b for _, b in parts])]
        wrong, right = shards.total(sums, self.world)
        self.gradient_error = math.sqrt(wrong / right)


def plan_of(context: Context) -> Plan:
    return Plan(kind="train", cp=context)


def plans(options: argparse.Namespace) -> dict[str, Context]:
    """Named points that exist for these ranks and heads, in the order asked for."""
    shape = PRESETS[options.model].shape
    legal = named_points(options.ranks, shape.heads, getattr(shape, "kv_heads", shape.heads))
    legal["tile"] = Context(ring=options.ranks)
    return {name: legal[name] for name in options.plans if name in legal}


def alone(dtype: str) -> str:
    """The name of the row of one device."""
    return f"one device, {dtype}"


def squares(parts: Sequence[torch.Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in parts)


def row_of(run: Run, dtype: str) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "ms": [1e3 * seconds for seconds in run.seconds],
        "losses": run.losses,
        "norms": run.norms,
    }


def shown(row: dict[str, Any]) -> str:
    if "gradient_error" not in row:
        return f"losses {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
    return (
        f"gradients {row['gradient_error']:.1e} ({row['gradient_over_own']:.2f} of bfloat16's own)"
        f", losses {row['loss_difference']:.1e}, {row['faster']:.2f}x one slice"
    )


def summary(rows: Sequence[dict[str, Any]], own: float) -> dict[str, Any]:
    """The worst of every plan, and whether all of it is within what is allowed.

    Empty until a plan has run in both dtypes.
    """
    shared = [row for row in rows if "gradient_error" in row]
    exact = [row for row in shared if row["dtype"] == "float32"]
    rounded = [row for row in shared if row["dtype"] == "bfloat16"]
    if not exact or not rounded:
        return {}
    worst = max(row["gradient_error"] for row in exact)
    losses = max(row["loss_difference"] for row in exact)
    ratio = max(row["gradient_over_own"] for row in rounded)
    return {
        "bf16_own_gradient_error": own,
        "fp32_gradient_error": worst,
        "fp32_loss_difference": losses,
        "bf16_gradient_over_own": ratio,
        "equal": max(worst, losses) <= FLOAT32_WITHIN and ratio <= BFLOAT16_WITHIN,
        "faster_than_one_slice": max(row["faster"] for row in rounded),
    }


def mps_words(ranks: int) -> str:
    # Under MPS a process sees the multiprocessors of its own slice.
    each = torch.cuda.get_device_properties(0).multi_processor_count
    return f"MPS slices of one {torch.cuda.get_device_name(0)} ({ranks} x {each} SMs)"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = job.parser(__doc__ or "", budget_s=540)
    made.add_argument("--ranks", type=int, default=4)
    made.add_argument("--model", default=None, help="a GPT preset")
    made.add_argument("--tokens", type=int, default=None, help="of the one sequence")
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--plans", nargs="+", default=["tile", "ring", "startrail(2)", "ulysses"])
    options = made.parse_args(arguments)
    options.model = options.model or ("gpt-tiny" if options.dry else "gpt-small")
    options.tokens = options.tokens or (259 if options.dry else 65536)
    options.started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
    return options


def main() -> int:
    options = parse()
    if "RANK" not in os.environ:
        return launch(options)
    torch.set_num_threads(1)
    bench = Bench(options)
    bench.run()
    bench.world.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
