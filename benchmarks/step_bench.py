"""Step parallelism with real ranks: the rows, how one rank times them, and the result. No script.

`steps_slices.py` runs it on slices of one GPU, `steps_gpus.py` on GPUs of one host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import full_size
import graphed
import job
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
    found = [(PUBLISHED, step_plan(ranks, Parastep(warmup=model.warmup_in(steps))))]
    if not absent(model, ranks, CFG_STEP):
        windows = options.cfg_windows or default_depth(steps, ranks // 2)
        found.append((CFG_STEP, step_plan(ranks // 2, Tail(depth=windows), cfg=2)))
    found.append((TAIL, step_plan(ranks, Tail(depth=options.step_depth or equal))))
    least = least_depth(steps, ranks)
    if model.name == "audioldm2" and least < equal:
        found.append((LEAST, step_plan(ranks, Tail(depth=least))))
    chosen = [Row(who, plan, steps, options.repeats) for who, plan in found]
    if not absent(model, ranks, CFG):
        chosen.append(cfg_alone(ranks, steps))
    return [row for row in chosen if not options.only or row.who in options.only]


def cfg_alone(ranks: int, steps: int) -> Row:
    """Every step exact: the groups of two repeat one another, so it works at full load."""
    timed = min(steps, 10)
    alone = Steps(degree=ranks // 2, windows=Fixed(warmup=timed), exact_split=False)
    return Row(CFG, Plan(step=alone, cfg=2), timed, 1)


def absent(model: full_size.Model, ranks: int, who: str) -> str:
    """Why a row with guidance split does not exist here, "" if it does."""
    if not model.guided:
        return f"{model.name} has one branch: its guidance is distilled"
    if ranks % 2 or (who == CFG_STEP and ranks < 4):
        return f"{ranks} ranks are no two groups of several"
    return ""


def step_plan(degree: int, windows: Any, cfg: int = 1) -> Plan:
    return Plan(step=Steps(degree=degree, windows=windows), cfg=Guidance(degree=cfg))


def exact_batch(plan: Plan, batch: int) -> int:
    """Rows that a rank evaluates in an exact step: cut over cfg, then over idle step ranks."""
    rows_left = batch // plan.cfg.degree
    if not plan.step.exact_split or plan.step.guesses == "own":
        return rows_left
    return rows_left // chunks_of(rows_left, plan.step.degree)


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


class Bench(job.Rank):
    """One rank's pipeline and the ways to time it. `words`: what a result calls the machine."""

    #: What the notes and lines of a result call one device.
    one_device = "one device"

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.model, self.shape = chosen(options)
        self.device = device
        super().__init__(options, self._mesh(step_plan(options.ranks, Tail())))
        self.dtype = torch.float32 if options.dry else self.model.dtype
        if options.dtype:
            self.dtype = getattr(torch, options.dtype)
        self.meshes: dict[str, Any] = {}
        self.graphs = self.model.graphs and self.device.type == "cuda"
        self.decoded: Any = None
        self.took: dict[str, float] = {}
        #: Whether one device, too, decodes in the parts that ranks would share.
        self.in_parts = False

    def _mesh(self, plan: Plan) -> Any:
        return init_mesh(plan, device=self.device, timeout_s=TIMEOUT_S)

    def words(self) -> str:
        """What a result calls the machine."""
        return job.device_words(self.device, self.ranks)

    def limit_memory(self) -> None:
        """Before the pipeline is built; nothing where each rank has a device of its own."""

    # ---- what is measured ------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self) -> None:
        """Build, load every kernel, and keep a denoiser call to evaluate on its own."""
        self.limit_memory()
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
        found = {whole, max(1, whole // 2)}
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
                own[k] = self.moved(own, k, self.model.decoded_shape(self.pipe, piece))
        if self.rank == 0:
            parts = [own[k].to(self.device) for k in range(len(pieces))]
            self.decoded = self.model.join(self.pipe, self.shape, parts, shared=True).cpu()

    def moved(self, own: dict[int, torch.Tensor], k: int, shape: tuple) -> torch.Tensor:
        """Piece k from its owner to rank 0."""
        if k in own:
            part = own[k].to(self.device)
        else:
            # Some decoders leave their result on the host, in a dtype of their own.
            part = torch.zeros(shape, dtype=own[0].dtype, device=self.device)
        moves = {k % self.ranks: 0}
        arrived = self.world.permute(part.contiguous(), None, moves, "decode").wait()
        return part if arrived is None else arrived

    # ---- rows ------------------------------------------------------------------------------------

    def sequential(self) -> dict:
        """The whole generation on rank 0, the others asleep."""
        seconds = self.on_rank_0(lambda: self.generate(None, self.shape.steps)[0])
        self.say(f"{SEQUENTIAL}: {shown(seconds)}")
        return {"who": SEQUENTIAL, "steps": self.shape.steps, **listed([seconds])}

    def parallel(self, row: Row) -> dict:
        """One repeat of a row on all ranks; times are rank 0's, the rest is of every rank."""
        if row.who not in self.meshes:
            self.meshes[row.who] = self._ready(row.plan)
        mesh = self.meshes[row.who]
        self.barrier()
        seconds, report = self.generate(row.plan, row.steps, mesh)
        self.barrier()
        reports = self.collect(report.as_dict())
        self.took[row.who] = seconds["end_to_end"]
        self.say(f"{row.who}: {shown(seconds)}, {report.depth} windows")
        return {"seconds": seconds, "reports": reports, "guided_bytes": report.guided_bytes}

    def _ready(self, plan: Plan) -> Any:
        """A mesh over which one window has been walked: groups connect at their first message."""
        mesh = self._mesh(plan)
        short = plan.model_copy(update={"step": replace(plan.step, windows=Fixed(warmup=1))})
        with parallelized(self.pipe, short, mesh=mesh):
            self.model.call(self.pipe, self.inputs, 1 + plan.step.degree)
        return mesh

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


def measure(bench: Bench, book: Book) -> bool:
    """Everything on a prepared bench; False where the sequential run does not fit the budget."""
    book.evaluations(*bench.denominators())
    options, expected = bench.options, bench.shape.steps * book.one("alone")
    if not bench.may_run(SEQUENTIAL, 1.3 * expected):
        return False
    book.sequential(bench.sequential())
    todo = rows(bench.model, options)
    for repeat in range(max((row.repeats for row in todo), default=0)):
        for row in todo:
            if repeat < row.repeats:
                one_row(bench, book, row)
    if bench.may_run("evaluations alone, again", 3 * options.evaluations * book.one("alone")):
        again = bench.on_rank_0(lambda: bench.evaluations(options.evaluations))
        book.result["evaluation_alone_again_s"] = medians(again)
    book.close()
    return True


def one_row(bench: Bench, book: Book, row: Row) -> None:
    if not bench.may_run(row.who, book.expected(row)):
        return
    found = bench.parallel(row)
    if not book.knows(row):
        found["exchange"] = bench.exchange(row, found["guided_bytes"])
    book.add(row, found)


class Book:
    """The result as it grows. All ranks keep one, rank 0 writes it."""

    def __init__(self, bench: Bench, case: str, notes: Sequence[str]):
        self.bench = bench
        options, shape = bench.options, bench.shape
        self.result = result.begin(f"{case}/{bench.model.name}", bench.words(), options.commit)
        self.result |= {
            "model": self._model(),
            "shape": vars(shape),
            "dtype": str(bench.dtype).removeprefix("torch."),
            "cuda_graphs": bench.graphs,
            "published_claim": bench.model.claim and {"speedup": bench.model.claim, "devices": 8},
            "notes": [*NOTES, *notes],
        }
        if bench.model.name == "cogvideox":
            self.result["notes"].append(f"{shape.frames} frames; the published run has 45")
        self.found: dict[str, list[dict]] = {}
        self.times: dict[str, dict] = {}
        self.base: dict[str, float] = {}

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
        one = self.bench.one_device
        self.bench.say(f"summary: times {one}, loop alone / working, end to end alone / working")
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
    "alone: one device works, the others sleep in a barrier; working: all run the same model at "
    "once, its loop time is the sequential loop scaled by the two evaluation times",
    "encode: everything of the pipeline call before the first evaluation, on every rank",
    "decode: sequential on one device; parallel rows share it over the ranks (chunks of frames, "
    "tiles, waveforms) and rank 0 joins; end_to_end_rank0_decode takes the sequential decode",
    "cfg2 alone: groups of two repeat one another, so it runs at the load of all devices",
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


def add_options(made: argparse.ArgumentParser) -> None:
    """Options of every script that runs these rows."""
    for name in ("steps", "frames", "height", "width"):
        made.add_argument(f"--{name}", type=int, help="instead of the model's own")
    made.add_argument("--dtype", help="float16, bfloat16 or float32; default the model's")
    made.add_argument("--repeats", type=int, default=2, help="of each parallel row")
    made.add_argument("--evaluations", type=int, default=5, help="single ones, per batch")
    made.add_argument("--step-depth", type=int, help="depth of the step tail row")
    made.add_argument("--cfg-windows", type=int, help="windows of the cfg2 x step row")
    made.add_argument("--only", action="append", default=[], help="a row's name; repeatable")
