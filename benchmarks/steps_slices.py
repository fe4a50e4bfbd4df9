"""Step parallelism on slices of one GPU: published schedule, ours and one slice, in one job.

python benchmarks/steps_slices.py --model svd --ranks 8 --out svd.json [--dry]

The parent starts the MPS daemon and one process per rank, each on an equal share of the GPU, joined
by gloo. Rank 0 writes the result after every row. Full-size weights are random (full_size.py), so
the numbers are of time, bytes and memory, not of fidelity. `--dry` walks the same code with tiny
models on the CPU, without MPS.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import full_size
import graphed
import mps
import result
import torch

from stretto import Plan, Steps, init_mesh, parallelized
from stretto.diffusion.denoise import Denoise
from stretto.diffusion.exact import chunks_of
from stretto.plan.options import HEADER_BYTES, Fixed, Guidance, Parastep, Tail
from stretto.search.windows import default_depth, least_depth, published

SEQUENTIAL, PUBLISHED, TAIL = "sequential", "published parastep", "step tail"
LEAST, CFG_STEP, CFG = "step tail, least depth", "cfg2 x step tail", "cfg2 alone"
#: A wait for rank 0's sequential run must outlast it.
TIMEOUT_S = 1200.0
#: Memory of a process's CUDA context, bytes, as seen in nvidia-smi.
CONTEXT_BYTES = 0.5e9


@dataclass(frozen=True)
class Row:
    """A plan, and how many of its steps are timed (fewer than it has: regular work, scaled)."""

    who: str
    plan: Plan
    steps: int
    repeats: int


def rows(model: full_size.Model, options: argparse.Namespace) -> list[Row]:
    """The parallel rows, the ones that matter most first."""
    ranks, steps = options.ranks, options.steps
    equal = len(published(steps, ranks, model.warmup_in(steps)))
    windows = options.cfg_windows or default_depth(steps, ranks // 2)
    found = [
        (PUBLISHED, step_plan(ranks, Parastep(warmup=model.warmup_in(steps)))),
        (CFG_STEP, step_plan(ranks // 2, Tail(depth=windows), cfg=2)),
        (TAIL, step_plan(ranks, Tail(depth=options.step_depth or equal))),
    ]
    least = least_depth(steps, ranks)
    if model.name == "audioldm2" and least < equal:
        found.append((LEAST, step_plan(ranks, Tail(depth=least))))
    timed = min(steps, 10)
    # Every step exact: the groups of two repeat one another, so this row works at full load.
    alone = Steps(degree=ranks // 2, windows=Fixed(warmup=timed), exact_split=False)
    cfg = Row(CFG, Plan(step=alone, cfg=2), timed, 1)
    chosen = [Row(who, plan, steps, options.repeats) for who, plan in found] + [cfg]
    return [row for row in chosen if not options.only or row.who in options.only]


def step_plan(degree: int, windows: Any, cfg: int = 1) -> Plan:
    return Plan(step=Steps(degree=degree, windows=windows), cfg=Guidance(degree=cfg))


def exact_batch(plan: Plan, batch: int) -> int:
    """Rows that a rank evaluates in an exact step: cut over cfg, then over idle step ranks."""
    rows_left = batch // plan.cfg.degree
    if not plan.step.exact_split or plan.step.guesses == "own":
        return rows_left
    return rows_left // chunks_of(rows_left, plan.step.degree)


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


def sizes_of(row: Row, model: full_size.Model) -> range:
    """As many items as the row has windows."""
    windows = row.plan.step.windows
    if isinstance(windows, Parastep):
        return range(len(published(row.steps, row.plan.step.degree, windows.warmup)))
    return range(windows.depth or row.steps)


def work(model: full_size.Model, shape: full_size.Shape) -> float:
    """Estimated time of an evaluation, in evaluations of the reference shape."""
    if model.name != "cogvideox":
        same = model.reference.frames * max(1, model.reference.height * model.reference.width)
        return shape.frames * max(1, shape.height * shape.width) / same
    # Linear layers and joint attention of a DiT of width 1920, in tokens.
    cost = [88.5e6 * n + 7680 * n * n for n in map(_tokens, (shape, model.reference))]
    return cost[0] / cost[1]


def _tokens(shape: full_size.Shape) -> int:
    return 226 + ((shape.frames - 1) // 4 + 1) * (shape.height // 16) * (shape.width // 16)


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


class Bench:
    """One rank's view of the job: its pipeline, and what rank 0 has measured so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model, self.shape = chosen(options)
        self.rank, self.ranks = int(os.environ["RANK"]), options.ranks
        self.device = torch.device("cpu" if options.dry else "cuda:0")
        self.dtype = torch.float32 if options.dry else self.model.dtype
        if options.dtype:
            self.dtype = getattr(torch, options.dtype)
        self.world = self._mesh(step_plan(self.ranks, Tail()))
        self.meshes: dict[str, Any] = {}
        self.graphs = self.model.graphs and self.device.type == "cuda"
        self.decoded: Any = None
        self.took: dict[str, float] = {}
        #: Whether one device, too, decodes in the parts that ranks would share.
        self.in_parts = False

    def _mesh(self, plan: Plan) -> Any:
        return init_mesh(plan, device=self.device, timeout_s=TIMEOUT_S)

    # ---- together ------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.time() - self.options.started:6.1f} s] {text}", flush=True)

    def barrier(self) -> None:
        result.synchronise(self.device)
        self.world.barrier()

    def collect(self, mine: Any) -> list[Any]:
        """A plain value of every rank, on all ranks."""
        parts = self.world.gather_bytes(json.dumps(mine).encode())
        return [json.loads(part) for part in parts]

    def may_run(self, who: str, expected_s: float) -> bool:
        """Rank 0 decides whether a row still fits the budget."""
        left = self.options.started + self.options.budget_s - time.time()
        told = self.world.broadcast_bytes(b"1" if expected_s < left else b"0")
        if told == b"0":
            self.say(f"no time left for {who}: {expected_s:.0f} s needed, {left:.0f} s left")
        return told == b"1"

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Rank 0 works alone, the others sleep in a barrier; its plain result on all ranks."""
        self.barrier()
        mine = work() if self.rank == 0 else None
        self.barrier()
        return self.collect(mine)[0]

    # ---- what is measured ------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self) -> None:
        """Build, load every kernel, and keep a denoiser call to evaluate on its own."""
        self._limit_memory()
        start = time.perf_counter()
        self.pipe = self.model.build(self.shape, self.device, self.dtype)
        self.inputs = self.model.inputs(self.shape, self.device, self.dtype)
        self.module = getattr(self.pipe, self.model.denoiser)
        if self.graphs:
            graphed.graph(self.pipe, self.model.denoiser)
        self.say(f"built in {time.perf_counter() - start:.1f} s, CUDA graphs: {self.graphs}")
        with self._kept_call() as kept:
            latents = self.model.call(self.pipe, self.inputs, 2)
        self.evaluation = kept[0]
        self.say("warm: sequential steps")
        for batch in self.batches():
            self.evaluate(batch)
        pieces = self.model.pieces(self.pipe, latents, shared=True)
        self.model.decode(self.pipe, pieces[min(self.rank, len(pieces) - 1)])
        if self.rank == 0:
            self._warm_whole_decode(latents)
        finite = all(self.collect(bool(latents.isfinite().all())))
        self.say(f"warm: batches {self.batches()} and decoding; latents finite: {finite}")
        if not finite:
            raise SystemExit("latents hold NaN or infinity after two steps: another --dtype?")
        self.barrier()

    def _warm_whole_decode(self, latents: torch.Tensor) -> None:
        """Other sizes take other kernels; three latent frames show them, and the memory needed."""
        whole = self.model.pieces(self.pipe, latents, shared=False)[0]
        try:
            self.model.decode(self.pipe, whole[:, :, :3] if whole.ndim == 5 else whole)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.in_parts = True
            self.say("no memory to decode in one piece: sequential decodes in parts, one by one")

    def _limit_memory(self) -> None:
        """Each process a part of the card, so that a cache grows at nobody else's cost."""
        if self.device.type != "cuda":
            return
        total = torch.cuda.get_device_properties(0).total_memory
        share = self.model.share * 8 / self.ranks
        first = 0.97 - self.ranks * CONTEXT_BYTES / total - (self.ranks - 1) * share
        torch.cuda.set_per_process_memory_fraction(share if self.rank else max(first, share))

    @contextmanager
    def _kept_call(self) -> Iterator[list[Denoise]]:
        kept: list[Denoise] = []

        def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
            named = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            kept[:] = [Denoise(self.model.denoiser, module, tuple(copies), named)]

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield kept
        finally:
            handle.remove()

    def batches(self) -> list[int]:
        """Every batch that some row evaluates, the whole first."""
        whole = self.evaluation.batch
        found = {whole, whole // 2}
        found |= {exact_batch(row.plan, whole) for row in rows(self.model, self.options)}
        return sorted(found, reverse=True)

    def evaluate(self, batch: int) -> float:
        """Seconds of one denoiser evaluation of `batch` rows."""
        whole = self.evaluation.batch
        part = self.evaluation.chunk(0, whole // batch) if batch < whole else self.evaluation
        with torch.no_grad():
            return result.timed(part.run, self.device)

    def evaluations(self, count: int) -> dict[str, list[float]]:
        """`count` evaluations per batch, the batches taking turns."""
        found: dict[str, list[float]] = {str(batch): [] for batch in self.batches()}
        for _ in range(count):
            for batch in self.batches():
                found[str(batch)].append(self.evaluate(batch))
        return found

    def denominators(self) -> tuple[dict, dict]:
        """Evaluation times of one slice alone, and of each while all work independently."""
        count = self.options.evaluations
        alone = self.on_rank_0(lambda: self.evaluations(count))
        self.barrier()
        together = self.collect(self.evaluations(count))
        working = {b: [t for one in together for t in one[b]] for b in alone}
        self.say(f"evaluation alone {medians(alone)}, working {medians(working)}")
        return alone, working

    def generate(self, plan: Plan | None, steps: int, mesh: Any = None) -> tuple[dict, Any]:
        """One generation with its decode: seconds by part, and the report of a parallel one."""
        loop_start: list[float] = []

        def first(*_: Any) -> None:
            if not loop_start:
                result.synchronise(self.device)
                loop_start.append(time.perf_counter())

        handle = self.module.register_forward_pre_hook(first)
        context = nullcontext() if plan is None else parallelized(self.pipe, plan, mesh=mesh)
        result.synchronise(self.device)
        start = time.perf_counter()
        with context as run:
            latents = self.model.call(self.pipe, self.inputs, steps)
        result.synchronise(self.device)
        looped = time.perf_counter()
        handle.remove()
        self.decode(latents, shared=plan is not None)
        end = time.perf_counter()
        seconds = {
            "encode": loop_start[0] - start,
            "loop": looped - loop_start[0],
            "decode": end - looped,
            "end_to_end": end - start,
        }
        self.took["finite"] = float(latents.isfinite().all())
        return seconds, None if run is None else run.report

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, shared: bool) -> None:
        """Pixels or sound on rank 0, from pieces that it decodes alone or that all ranks share."""
        in_parts = shared or self.in_parts
        pieces = self.model.pieces(self.pipe, latents, shared=in_parts)
        if not shared:
            parts = [self.model.decode(self.pipe, piece) for piece in pieces]
            self.decoded = self.model.join(self.pipe, self.shape, parts, shared=in_parts).cpu()
            return
        own = {
            k: self.model.decode(self.pipe, piece)
            for k, piece in enumerate(pieces)
            if k % self.ranks == self.rank
        }
        for k, piece in enumerate(pieces):
            if k % self.ranks and self.rank in (0, k % self.ranks):
                own[k] = self._moved(own, k, self.model.decoded_shape(self.pipe, piece))
        if self.rank == 0:
            parts = [own[k].to(self.device) for k in range(len(pieces))]
            self.decoded = self.model.join(self.pipe, self.shape, parts, shared=True).cpu()

    def _moved(self, own: dict[int, torch.Tensor], k: int, shape: tuple) -> torch.Tensor:
        """Piece k from its owner to rank 0; gloo sends from the host's memory."""
        part = own[k].cpu() if k in own else torch.zeros(shape, dtype=own[0].dtype)
        moved = self.world.permute(part.contiguous(), None, {k % self.ranks: 0}, "decode").wait()
        return part if moved is None else moved

    # ---- rows ------------------------------------------------------------------------------------

    def sequential(self) -> dict:
        """The whole generation on rank 0, the others asleep."""
        seconds = self.on_rank_0(lambda: self.generate(None, self.shape.steps)[0])
        self.say(f"{SEQUENTIAL}: {shown(seconds)}")
        return {"who": SEQUENTIAL, "steps": self.shape.steps, **listed([seconds])}

    def parallel(self, row: Row) -> dict:
        """One repeat of a row on all ranks; times are rank 0's, the rest is of every rank."""
        mesh = self.meshes.get(row.who) or self._mesh(row.plan)
        self.meshes[row.who] = mesh
        self.barrier()
        seconds, report = self.generate(row.plan, row.steps, mesh)
        self.barrier()
        reports = self.collect(report.as_dict())
        self.took[row.who] = seconds["end_to_end"]
        self.say(f"{row.who}: {shown(seconds)}, {report.depth} windows")
        return {"seconds": seconds, "reports": reports, "guided_bytes": report.guided_bytes}

    def exchange(self, row: Row, guided_bytes: int) -> list[float]:
        """Seconds of gathering one window's messages, nothing else going on."""
        mesh = self.meshes[row.who]
        message = torch.zeros(HEADER_BYTES + guided_bytes, dtype=torch.uint8, device=self.device)

        def gather() -> None:
            mesh.all_gather(message, "step", "window").wait()

        found = []
        for _ in range(5):
            self.barrier()
            found.append(result.timed(gather, self.device))
        return found


def run_rank(options: argparse.Namespace) -> int:
    """Everything one rank does; rank 0 keeps the result."""
    torch.set_num_threads(1)
    bench = Bench(options)
    bench.prepare()
    book = Book(bench)
    book.evaluations(*bench.denominators())
    expected = bench.shape.steps * book.one("alone")
    if not bench.may_run(SEQUENTIAL, 1.3 * expected):
        # Without its denominator nothing else would say anything.
        raise SystemExit("the sequential run does not fit the budget: fewer frames or steps")
    book.sequential(bench.sequential())
    todo = rows(bench.model, options)
    for repeat in range(max(row.repeats for row in todo)):
        for row in todo:
            if repeat < row.repeats:
                one_row(bench, book, row)
    if bench.may_run("evaluations alone, again", 3 * options.evaluations * book.one("alone")):
        again = bench.on_rank_0(lambda: bench.evaluations(options.evaluations))
        book.result["evaluation_alone_again_s"] = medians(again)
    book.close()
    return 0


def one_row(bench: Bench, book: Book, row: Row) -> None:
    if not bench.may_run(row.who, book.expected(row)):
        return
    found = bench.parallel(row)
    if not book.knows(row):
        found["exchange"] = bench.exchange(row, found["guided_bytes"])
    book.add(row, found)


class Book:
    """The result as it grows. All ranks keep one, rank 0 writes it."""

    def __init__(self, bench: Bench):
        self.bench = bench
        options, shape = bench.options, bench.shape
        self.result = result.begin(
            f"diffusion/steps-slices/{bench.model.name}", self._device(), options.commit
        )
        self.result |= {
            "model": self._model(),
            "shape": vars(shape),
            "dtype": str(bench.dtype).removeprefix("torch."),
            "cuda_graphs": bench.graphs,
            "published_claim": {"speedup": bench.model.claim, "devices": 8},
            "notes": NOTES,
        }
        if bench.model.name == "cogvideox":
            self.result["notes"] = [*NOTES, f"{shape.frames} frames; the published run has 45"]
        self.found: dict[str, list[dict]] = {}
        self.times: dict[str, dict] = {}
        self.base: dict[str, float] = {}

    def _device(self) -> str:
        if self.bench.device.type == "cpu":
            return f"{self.bench.ranks} gloo ranks of one thread on a CPU, tiny models (dry)"
        # Under MPS a process sees the multiprocessors of its own slice.
        slice_of = torch.cuda.get_device_properties(0).multi_processor_count
        name = torch.cuda.get_device_name(0)
        return f"MPS slices of one {name} ({self.bench.ranks} x {slice_of} SMs)"

    def _model(self) -> dict:
        parameters = sum(p.numel() for p in self.bench.module.parameters())
        return {"name": self.bench.model.name, "parameters": parameters, "weights": "random"}

    def one(self, load: str, batch: int | None = None) -> float:
        """Median seconds of an evaluation, `alone` or `working`; of the whole batch by default."""
        whole = self.bench.evaluation.batch
        return self.times[load][str(batch or whole)]["median"]

    def expected(self, row: Row) -> float:
        """Seconds the row will take: as before, or from its windows and evaluation times."""
        known = self.bench.took.get(row.who)
        if known:
            return 1.1 * known
        batch = self.bench.evaluation.batch // row.plan.cfg.degree
        count = len(sizes_of(row, self.bench.model)) if row.who != CFG else row.steps
        return 1.2 * count * self.one("working", batch) + self.base["decode"] / 2

    def knows(self, row: Row) -> bool:
        return row.who in self.found

    def evaluations(self, alone: dict, working: dict) -> None:
        self.times = {
            "alone": {batch: result.spread(v) for batch, v in alone.items()},
            "working": {batch: result.spread(v) for batch, v in working.items()},
        }
        self.result["evaluation_s"] = self.times
        self.write()

    def sequential(self, row: dict) -> None:
        self.base = {part: values[0] for part, values in row["seconds"].items()}
        self.result["rows"].append(row)
        steps, working = self.bench.shape.steps, self.one("working")
        loop = self.base["loop"] * working / self.one("alone")
        rest = self.base["end_to_end"] - self.base["loop"]
        self.result["denominators_s"] = {
            "alone": {"loop": self.base["loop"], "end_to_end": self.base["end_to_end"]},
            "working": {"loop": loop, "end_to_end": loop + rest},
            "evaluations": {"alone": steps * self.one("alone"), "working": steps * working},
        }
        self.write()

    def add(self, row: Row, found: dict) -> None:
        """One more repeat; the row's entry is made anew from all of them."""
        self.found.setdefault(row.who, []).append(found)
        entry = self._entry(row, self.found[row.who])
        others = [known for known in self.result["rows"] if known["who"] != row.who]
        self.result["rows"] = [*others, entry]
        self.result["summary"][row.who] = entry["speedup"]
        self.write()

    def _entry(self, row: Row, repeats: list[dict]) -> dict:
        reports = repeats[-1]["reports"]
        sizes = [window["size"] for window in reports[0]["windows"]]
        units = self._units(row, sizes)
        scale = self.bench.shape.steps / row.steps
        return {
            "who": row.who,
            "plan": str(row.plan),
            "basis": "measured" if scale == 1 else f"{row.steps} steps measured, scaled",
            "walk": reports[0]["walk"],
            "steps": row.steps,
            **listed([one["seconds"] for one in repeats]),
            "windows": sizes,
            "depth_windows": len(sizes),
            "depth_units": units,
            "ceiling": row.steps / units,
            "ceiling_if_halves_cost_half": row.steps / self._units(row, sizes, ideal=True),
            "evaluations": [report["evaluations"] for report in reports],
            "network_calls": [report["network_calls"] for report in reports],
            "bytes_per_rank": [report["bytes_sent"] for report in reports],
            "bytes_by_phase": reports[0]["bytes_by_phase"],
            "guided_bytes": repeats[0]["guided_bytes"],
            "window_s": window_times(repeats),
            "exchange_s": result.spread(repeats[0]["exchange"]),
            "speedup": self._speedup(row, repeats, scale),
        }

    def _units(self, row: Row, sizes: Sequence[int], *, ideal: bool = False) -> float:
        """Time of the windows in guided evaluations of one slice alone."""
        whole = self.bench.evaluation.batch

        def cost(batch: int) -> float:
            return batch / whole if ideal else self.one("alone", batch) / self.one("alone")

        exact, window = cost(exact_batch(row.plan, whole)), cost(whole // row.plan.cfg.degree)
        # The first step of a run finds out the form of outputs and is cut over cfg only.
        return window + sum(exact if size == 1 else window for size in sizes[1:])

    def _speedup(self, row: Row, repeats: list[dict], scale: float) -> dict:
        """Ratios of medians, against both denominators; above 1 is faster than one slice."""
        parts = {part: [one["seconds"][part] for one in repeats] for part in self.base}
        loop = scale * statistics.median(parts["loop"])
        around = statistics.median(parts["encode"]) + statistics.median(parts["decode"])
        own_decode = loop + statistics.median(parts["encode"]) + self.base["decode"]
        below = self.result["denominators_s"]
        found: dict[str, Any] = {}
        for load in ("alone", "working"):
            found[f"loop_vs_{load}"] = below[load]["loop"] / loop
            found[f"end_to_end_vs_{load}"] = below[load]["end_to_end"] / (loop + around)
            found[f"end_to_end_rank0_decode_vs_{load}"] = below[load]["end_to_end"] / own_decode
        whole = self.one("working") / self.one("alone")
        return {**found, "working_over_alone": whole}

    def close(self) -> None:
        self.result["finite"] = self.bench.took["finite"] == 1.0
        self.result["sequential_decodes_in_parts"] = self.bench.in_parts
        self.result["memory_bytes"] = self.bench.collect(memory(self.bench.device))
        self.write()
        self.bench.say("summary: times one slice, loop alone / working, end to end alone / working")
        for who, speed in self.result["summary"].items():
            keys = ("loop_vs_alone", "loop_vs_working")
            keys += ("end_to_end_vs_alone", "end_to_end_vs_working")
            ceiling = next(r["ceiling"] for r in self.result["rows"] if r["who"] == who)
            numbers = "  ".join(f"{speed[key]:5.2f}" for key in keys)
            self.bench.say(f"{who:24} {numbers}  ceiling {ceiling:.2f}")

    def write(self) -> None:
        if self.bench.rank == 0:
            result.write(self.bench.options.out, self.result)


NOTES = [
    "random weights: time, bytes and memory, never fidelity",
    "alone: one slice works, the others sleep in a barrier; working: all run the same model at "
    "once, its loop time is the sequential loop scaled by the two evaluation times",
    "encode: everything of the pipeline call before the first evaluation, on every rank",
    "decode: sequential on one slice; parallel rows share it over the ranks (chunks of frames, "
    "tiles, waveforms) and rank 0 joins; end_to_end_rank0_decode takes the sequential decode",
    "cfg2 alone: groups of two repeat one another, so it runs at the load of all slices",
    "ceiling: steps over windows in units of a guided evaluation alone, smaller batches at their "
    "measured cost",
]


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {batch: round(statistics.median(values), 4) for batch, values in times.items()}


def shown(seconds: dict[str, float]) -> str:
    return ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items())


def listed(repeats: list[dict[str, float]]) -> dict:
    """Repeats by part, and the loop in milliseconds as result/1 names it."""
    parts = {part: [one[part] for one in repeats] for part in repeats[0]}
    return {"ms": [1e3 * value for value in parts["loop"]], "seconds": parts}


def window_times(repeats: list[dict]) -> dict[str, float]:
    """Median seconds of a window on rank 0, by size; the first window of a run left out."""
    found: dict[int, list[float]] = {}
    for one in repeats:
        for window in one["reports"][0]["windows"][1:]:
            found.setdefault(window["size"], []).append(window["seconds"])
    return {str(size): statistics.median(values) for size, values in sorted(found.items())}


def memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def chosen(options: argparse.Namespace) -> tuple[full_size.Model, full_size.Shape]:
    """The model and its shape; `options.steps` becomes the number it has."""
    model = full_size.MODELS[options.model](tiny=options.dry)
    given = {name: getattr(options, name) for name in ("steps", "frames", "height", "width")}
    shape = model.default.but(**given)
    options.steps = shape.steps
    return model, shape


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(full_size.MODELS), required=True)
    parser.add_argument("--ranks", type=int, default=8, help="even, 4 or more")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    for name in ("steps", "frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    parser.add_argument("--dtype", help="float16, bfloat16 or float32; default the model's")
    parser.add_argument("--repeats", type=int, default=2, help="of each parallel row")
    parser.add_argument("--evaluations", type=int, default=5, help="single ones, per batch")
    parser.add_argument("--step-depth", type=int, help="depth of the step tail row")
    parser.add_argument("--cfg-windows", type=int, help="windows of the cfg2 x step row")
    parser.add_argument("--only", action="append", default=[], help="a row's name; repeatable")
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
