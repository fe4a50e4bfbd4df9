"""Step parallelism on slices of one GPU: published schedule, ours and one slice, in one job.

python benchmarks/steps_slices.py --model svd --ranks 8 --out svd.json [--dry]

The parent starts the MPS daemon and one process per rank, each on an equal share of the GPU, joined
by gloo. Rank 0 writes the result after every row. Full-size weights are random (full_size.py), so
the numbers are of time, bytes and memory, not of fidelity. `--dry` walks the same code with tiny
models on the CPU, without MPS.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import full_size
import mps
import step_bench
import torch
from step_bench import (
    CFG,
    CFG_STEP,
    LEAST,
    PUBLISHED,
    SEQUENTIAL,
    TAIL,
    Book,
    chosen,
    exact_batch,
    rows,
    sizes_of,
    work,
)

__all__ = ["CFG", "CFG_STEP", "LEAST", "PUBLISHED", "SEQUENTIAL", "TAIL", "exact_batch"]

#: Memory of a process's CUDA context, bytes, as seen in nvidia-smi.
CONTEXT_BYTES = 0.5e9


# ---- the parent --------------------------------------------------------------------------------


def launch(options: argparse.Namespace) -> int:
    """Start the daemon and the ranks, wait, and end both whatever happens."""
    announce(options)
    with nullcontext({}) if options.dry else mps.daemon() as environment:
        ranks = start(options, environment)
        try:
            return wait(ranks, options.started + options.budget_s + options.grace_s)
        finally:
            for process, _ in ranks:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def announce(options: argparse.Namespace) -> None:
    """The plan with estimated seconds, before anything starts."""
    model, shape = chosen(options)
    one = model.seconds * work(model, shape) * options.ranks / 8
    print(f"{model.name}: {shape}, {options.ranks} ranks, budget {options.budget_s:g} s")
    if options.dry:
        print("  dry: tiny weights on the CPU, no estimate")
        return
    print(f"  one guided evaluation on a slice: about {one:.2f} s (H200)")
    print(f"  {SEQUENTIAL:24} 1 x {shape.steps * one:6.1f} s, and its decode")
    for row in rows(model, options):
        count = len(sizes_of(row, model)) if row.who != CFG else row.steps
        each = count * one * (0.58 if row.plan.cfg.degree == 2 else 1.13)
        print(f"  {row.who:24} {row.repeats} x {each:6.1f} s, {count} windows, and its decode")


def start(options: argparse.Namespace, environment: dict) -> list[tuple[subprocess.Popen, Path]]:
    """One process per rank; rank 0 speaks to the terminal, the others to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="slices-"))
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
        # Each process has a hard limit: what is reserved in pieces must not count against it.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "" if options.dry else "0",
        "BENCHMARK_STARTED": str(options.started),
    }
    found = []
    for rank in range(options.ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = folder / f"rank{rank}.log"
        command = [sys.executable, __file__, *sys.argv[1:]]
        if rank == 0:
            found.append((subprocess.Popen(command, env=own), log))
            continue
        with log.open("w") as file:
            process = subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT)
        found.append((process, log))
    return found


def wait(ranks: list[tuple[subprocess.Popen, Path]], until: float) -> int:
    """Exit status of the job: 0, or the first failure, with the end of that rank's log."""
    while any(process.poll() is None for process, _ in ranks):
        failed = [r for r, (process, _) in enumerate(ranks) if process.poll()]
        if failed or time.time() > until:
            # The others may be about to say which rank they miss.
            time.sleep(5 if failed else 0)
            return report_failure(ranks, failed)
        time.sleep(0.2)
    failed = [r for r, (process, _) in enumerate(ranks) if process.returncode]
    return report_failure(ranks, failed) if failed else 0


def report_failure(ranks: list[tuple[subprocess.Popen, Path]], failed: list[int]) -> int:
    print(f"failed: ranks {failed}" if failed else "failed: out of time; the rows so far stand")
    for rank, (_, log) in enumerate(ranks):
        text = log.read_text()[-2000:] if log.exists() else ""
        if text and (rank in failed or not failed):
            print(f"--- rank {rank}\n{text}")
    return 1


# ---- a rank --------------------------------------------------------------------------------------


class Bench(step_bench.Bench):
    """Ranks that share a GPU: equal parts of its memory, and host memory between them."""

    one_device = "one slice"

    def words(self) -> str:
        if self.device.type == "cpu":
            return f"{self.ranks} gloo ranks of one thread on a CPU, tiny models (dry)"
        # Under MPS a process sees the multiprocessors of its own slice.
        slice_of = torch.cuda.get_device_properties(0).multi_processor_count
        name = torch.cuda.get_device_name(0)
        return f"MPS slices of one {name} ({self.ranks} x {slice_of} SMs)"

    def limit_memory(self) -> None:
        """Each process a part of the card, so that a cache grows at nobody else's cost."""
        if self.device.type != "cuda":
            return
        total = torch.cuda.get_device_properties(0).total_memory
        share = self.model.share * 8 / self.ranks
        first = 0.97 - self.ranks * CONTEXT_BYTES / total - (self.ranks - 1) * share
        torch.cuda.set_per_process_memory_fraction(share if self.rank else max(first, share))

    def moved(self, own: dict[int, torch.Tensor], k: int, shape: tuple) -> torch.Tensor:
        """Piece k from its owner to rank 0; gloo sends from the host's memory."""
        part = own[k].cpu() if k in own else torch.zeros(shape, dtype=own[0].dtype)
        moved = self.world.permute(part.contiguous(), None, {k % self.ranks: 0}, "decode").wait()
        return part if moved is None else moved


def run_rank(options: argparse.Namespace) -> int:
    """Everything one rank does; rank 0 keeps the result."""
    torch.set_num_threads(1)
    bench = Bench(options, torch.device("cpu" if options.dry else "cuda:0"))
    bench.prepare()
    book = Book(bench, "diffusion/steps-slices", ["one device: a slice"])
    if not step_bench.measure(bench, book):
        # Without its denominator nothing else would say anything.
        raise SystemExit("the sequential run does not fit the budget: fewer frames or steps")
    return 0


def small_enough() -> list[str]:
    """Models of which eight fit one GPU."""
    return sorted(name for name, model in full_size.MODELS.items() if model.share)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=small_enough(), required=True)
    parser.add_argument("--ranks", type=int, default=8, help="even, 4 or more")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    step_bench.add_options(parser)
    parser.add_argument("--budget-s", type=float, default=480, help="no row starts that ends later")
    parser.add_argument("--grace-s", type=float, default=60, help="after it the job is ended")
    parser.add_argument("--commit", default="unknown", help="recorded in the result")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, no MPS")
    options = parser.parse_args(arguments)
    if options.ranks < 4 or options.ranks % 2:
        parser.error(f"--ranks {options.ranks}: an even number from 4 on, for cfg2 x step")
    options.started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
    return options


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_rank(arguments) if "RANK" in os.environ else launch(arguments))
