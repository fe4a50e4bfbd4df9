"""What the hooks and the replay cost on one device, and what larger batches cost.

python benchmarks/steps_overhead.py --out overhead.json [--curves dit,audioldm2] [--compile] [--dry]

Hooks: the same pipeline call plain and under a plan of one rank, in turns. All comparisons take a
round before any takes the next, so that a slow stretch of the host falls on a few rounds of each,
not on all rounds of one. Before and after every piece the host is gauged by small launches that
nobody waits for: medians are given of all rounds, and of those that found it quiet. Replay: one
process walks as the last of p step ranks, with a mesh that hands its own message back in place of
its peers', so snapshots, guesses, packing and the true steps are all there and transport is not. It
is held against three runs, in turns. One is plain, with as many evaluations and so with fewer
steps. One is the whole plain run whose other evaluations cost nothing (an output is handed out
again): it has every scheduler step and recombination that the pipeline makes itself and that no
parallel run can leave out; above it is what windows cost. The last is such a run of as many
scheduler steps as the rank takes, guessed and true; above it is what hooks and replay cost beside
the scheduler's own arithmetic. Entering the context and walking a first window, done once for any
number of calls, stand apart. Transport is measured in steps_slices.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import full_size
import result
import torch

from stretto import Mesh, Plan, Steps, init_mesh, parallelized
from stretto.diffusion.shipped.recipe import Recipe, build
from stretto.mesh.mesh import Pending
from stretto.plan.options import Fixed

#: A way to call the pipeline: entered for every call, and timed inside.
Work = Callable[[], AbstractContextManager[Callable[[], Any]]]
#: Steps of a replayed generation: one exact, then full windows of 2, 4 or 8.
STEPS = 49
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
#: Of the summary: where it comes from. Over a plain run of as many evaluations, over the whole
#: plain run whose other evaluations are free, and over one of as many scheduler steps.
MEASURES = {
    "hooks_percent": ("hooks", "overhead_percent"),
    "replay_percent": ("replay", "overhead_percent"),
    "replay_added_percent": ("replay", "added_percent"),
    "replay_beyond_steps_percent": ("replay", "beyond_steps_percent"),
}
#: A round is quiet if no gauge of its pieces lies above this multiple of the run's fastest tenth.
QUIET = 1.3
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DPM++2M": ("DPMSolverMultistepScheduler", FLOW),
    "UniPC": ("UniPCMultistepScheduler", FLOW),
    "Heun": ("HeunDiscreteScheduler", {}),
}


class EchoMesh(Mesh):
    """The last of the step ranks, alone: what peers would send is what this rank sends."""

    def __init__(self, sizes: dict[str, int], device: torch.device):
        super().__init__(sizes, sizes["step"] - 1, device)

    def all_gather(self, tensor: torch.Tensor, axis: str | None, phase: str) -> Pending:
        return Pending(lambda: [tensor] * self.size(axis))

    def broadcast(self, tensor: torch.Tensor, axis: str | None, src: int, phase: str) -> Pending:
        return Pending(lambda: tensor)

    def broadcast_bytes(self, data: bytes, axis: str | None = None, src: int = 0) -> bytes:
        """Random states come from rank 0, which has those of this rank."""
        return data

    def permute(self, tensor: torch.Tensor, axis: Any, moves: Any, phase: str) -> Pending:
        return Pending(lambda: tensor)

    def all_reduce(self, *_: Any, **__: Any) -> Pending:
        raise AssertionError("step parallelism sums nothing")

    def exchange(self, *_: Any, **__: Any) -> Pending:
        raise AssertionError("step parallelism exchanges nothing uneven")

    def record(self, stage: str, *, waiting: bool = False) -> None:
        """Nobody asks."""

    def abort(self, reason: str) -> None:
        """Nobody waits."""

    def check(self) -> None:
        """Nobody else can fail."""

    def close(self) -> None:
        """Nothing is held."""


class Bench:
    """A class-conditional DiT at a batch that keeps the device busy."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device("cuda" if not options.dry else "cpu")
        self.dtype = torch.float32 if options.dry else torch.bfloat16
        recipe = Recipe(width=options.width, layers=options.layers, heads=options.heads)
        with full_size.default_dtype(torch.float32):
            self.pipe = build(recipe, 28)
        full_size.fill_zero_weights(self.pipe.transformer)
        self.pipe = self.pipe.to(self.device, self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.labels = [k % 10 for k in range(options.batch)]
        self.latents = full_size.draw(0, options.batch, 1, 28, 28).to(self.device, self.dtype)

    def use(self, name: str) -> None:
        import diffusers

        kind, config = SCHEDULERS[name]
        self.pipe.scheduler = getattr(diffusers, kind)(**config)

    def call(self, steps: int) -> Any:
        return self.pipe(
            self.labels, num_inference_steps=steps, latents=self.latents, output_type="latent"
        ).images

    def steps_for(self, name: str, calls: int) -> int:
        """`num_inference_steps` for that many calls of scheduler.step; Heun makes 2 n - 1."""
        return (calls + 1) // 2 if name == "Heun" else calls

    @torch.no_grad()
    def evaluate(self) -> float:
        """Seconds of one guided evaluation."""
        x = torch.cat([self.latents, self.latents])
        labels = torch.tensor([*self.labels, *self.labels], device=self.device)
        t = torch.full((len(x),), 500.0, device=self.device, dtype=self.dtype)
        return result.timed(lambda: self.pipe.denoise(x, t, labels), self.device)


@dataclass
class Comparison:
    """Pieces of work by name under one scheduler, and the seconds each took in every round."""

    who: str
    scheduler: str
    works: dict[str, Work]
    #: Of the row: what was settled before timing, and what the times say.
    facts: dict[str, Any]
    judge: Callable[[dict[str, list[float]]], dict[str, Any]]
    times: dict[str, list[float]] = field(default_factory=dict)
    #: Milliseconds of the host's gauge beside each, the larger of before and after.
    gauges: dict[str, list[float]] = field(default_factory=dict)

    def warm(self) -> None:
        for entered in self.works.values():
            with entered() as work:
                work()
        self.times = {name: [] for name in self.works}
        self.gauges = {name: [] for name in self.works}

    def take_round(self, index: int, device: torch.device) -> None:
        """Each once, one after another, the order alternating."""
        for name in list(self.works)[:: -1 if index % 2 else 1]:
            with self.works[name]() as work:
                before = gauge(device)
                self.times[name].append(result.timed(work, device))
                self.gauges[name].append(max(before, gauge(device)))

    def row(self) -> dict[str, Any]:
        judged = self.judge(self.times)
        return {"who": self.who, **self.facts, **judged, "gauge_ms": self.gauges}


def gauge(device: torch.device) -> float:
    """Milliseconds the host takes for 200 launches on a few numbers; the device may still run."""
    x = torch.zeros(8, device=device)
    start = time.perf_counter()
    for _ in range(200):
        x = x + 1
    return 1e3 * (time.perf_counter() - start)


def mark_quiet(rows: list[dict]) -> None:
    """Say of every row which rounds found the host quiet, and the medians of those alone."""
    rows = [row for row in rows if "gauge_ms" in row]
    gauges = sorted(g for row in rows for found in row["gauge_ms"].values() for g in found)
    if not gauges:
        return
    limit = QUIET * gauges[len(gauges) // 10]
    for row in rows:
        row["quiet"] = [
            max(found) <= limit for found in zip(*row["gauge_ms"].values(), strict=True)
        ]
        for measure in {measure for _, measure in MEASURES.values()} & row.keys():
            values = itertools.compress(row[measure]["all"], row["quiet"])
            row[measure]["quiet_median"] = median_of(list(values))


def median_of(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def in_rounds(
    comparisons: Sequence[Comparison],
    count: int,
    device: torch.device,
    use: Callable[[str], None],
) -> Iterator[list[dict]]:
    """All comparisons in turns, `count` times; the rows after every round."""
    for comparison in comparisons:
        use(comparison.scheduler)
        comparison.warm()
    gauge(device)
    for index in range(count):
        for comparison in comparisons:
            use(comparison.scheduler)
            comparison.take_round(index, device)
        rows = [comparison.row() for comparison in comparisons]
        mark_quiet(rows)
        yield rows


def entering(bench: Bench, plan: Plan, mesh: Mesh, count: int = 21) -> dict[str, Any]:
    """Milliseconds to enter and leave, which is done once for any number of calls."""

    def enter() -> None:
        with parallelized(bench.pipe, plan, mesh=mesh):
            pass

    return result.spread([1e3 * result.timed(enter, "cpu") for _ in range(count)])


def above(base: list[float], other: list[float]) -> dict[str, Any]:
    """By how many percent each round's time lies above the base's."""
    return result.spread([1e2 * (b / a - 1) for a, b in zip(base, other, strict=True)])


def milliseconds(times: list[float]) -> list[float]:
    return [1e3 * time for time in times]


def hooks(bench: Bench, name: str) -> Comparison:
    """A plan of one rank against the plain pipeline, equal steps."""
    bench.use(name)
    steps = bench.steps_for(name, 13)
    plan = Plan()
    mesh = init_mesh(plan, device=bench.device)
    works = {
        "plain": partial(plain, bench, steps),
        "ours": partial(under, bench, plan, mesh, steps),
    }
    with works["ours"]() as ours:
        same = torch.equal(bench.call(steps), ours())
    facts = {"calls": 13, "bitwise": same}
    return Comparison(f"hooks/{name}", name, works, facts, judge_hooks)


def judge_hooks(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "plain_ms": milliseconds(times["plain"]),
        "ms": milliseconds(times["ours"]),
        "overhead_percent": above(times["plain"], times["ours"]),
    }


@contextmanager
def plain(bench: Bench, steps: int) -> Iterator[Callable[[], Any]]:
    """The call as it is."""
    yield lambda: bench.call(steps)


@contextmanager
def under(bench: Bench, plan: Plan, mesh: Mesh, steps: int) -> Iterator[Callable[[], Any]]:
    """The call under a plan, of which a window has been walked: memory of its own is there."""
    with parallelized(bench.pipe, plan, mesh=mesh):
        bench.call(min(steps, 1 + plan.step.degree))
        yield lambda: bench.call(steps)


@contextmanager
def free(bench: Bench, steps: int, every: int) -> Iterator[Callable[[], Any]]:
    """The plain run, of whose denoiser calls only the first and every `every`-th take time."""
    module, calls, kept = bench.pipe.transformer, itertools.count(), []
    evaluate = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(calls) % every == 0:
            kept[:] = [evaluate(*args, **kwargs)]
        return kept[0]

    module.forward = forward
    try:
        yield lambda: bench.call(steps)
    finally:
        del module.forward


def replay(bench: Bench, name: str, degree: int) -> Comparison:
    """The last rank of full windows against plain runs of as many evaluations."""
    bench.use(name)
    windows, made = (STEPS - 1) // degree, 2 * degree - 1
    plan = Plan(step=Steps(degree=degree, windows=Fixed(warmup=1), exact_split=False))
    mesh = EchoMesh(plan.sizes, bench.device)
    steps = bench.steps_for(name, STEPS)
    with parallelized(bench.pipe, plan, mesh=mesh) as run:
        bench.call(steps)
    assert run.report.evaluations == 1 + windows, run.report.evaluations
    works = {
        "plain": partial(plain, bench, bench.steps_for(name, 1 + windows)),
        "free": partial(free, bench, steps, degree),
        "as_many": partial(free, bench, bench.steps_for(name, 1 + windows * made), made),
        "ours": partial(under, bench, plan, mesh, steps),
    }
    facts = {
        "windows": list(run.report.sizes),
        "evaluations": 1 + windows,
        "entering_ms": entering(bench, plan, mesh),
    }
    return Comparison(
        f"replay/{name}/p{degree}", name, works, facts, partial(judge_replay, windows)
    )


def judge_replay(windows: int, times: dict[str, list[float]]) -> dict[str, Any]:
    extra = [1e3 * (b - a) for a, b in zip(times["free"], times["ours"], strict=True)]
    return {
        "extra_ms_per_window": statistics.median(extra) / windows,
        "plain_ms": milliseconds(times["plain"]),
        "free_ms": milliseconds(times["free"]),
        "as_many_ms": milliseconds(times["as_many"]),
        "ms": milliseconds(times["ours"]),
        "overhead_percent": above(times["plain"], times["ours"]),
        "added_percent": above(times["free"], times["ours"]),
        "beyond_steps_percent": above(times["as_many"], times["ours"]),
    }


def dit_curve(bench: Bench) -> dict:
    """Evaluation time of k windows' inputs in one batch, over that of one."""

    @torch.no_grad()
    def evaluate(rows: int) -> float:
        x = full_size.draw(1, rows, 1, 28, 28).to(bench.device, bench.dtype)
        t = torch.full((rows,), 500.0, device=bench.device, dtype=bench.dtype)
        labels = torch.zeros(rows, dtype=torch.int64, device=bench.device)
        return result.timed(lambda: bench.pipe.denoise(x, t, labels), bench.device)

    return curve("dit", evaluate, 2 * bench.options.curve_batch, bench.options.repeats)


def full_curve(name: str, options: argparse.Namespace) -> dict:
    """The same on a full-size denoiser, with the inputs that its pipeline passes."""
    model = full_size.MODELS[name](tiny=options.dry)
    device = "cpu" if options.dry else "cuda"
    dtype = torch.float32 if options.dry else model.dtype
    pipe = model.build(model.default, device, dtype)
    module, kept = getattr(pipe, model.denoiser), []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True
    )
    model.call(pipe, model.inputs(model.default, device, dtype), 1)
    handle.remove()
    args, kwargs = kept[0]
    whole = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()
    def evaluate(rows: int) -> float:
        fitted = [fit(v, len(whole), rows) for v in args]
        named = {k: fit(v, len(whole), rows) for k, v in kwargs.items()}
        return result.timed(lambda: module(*fitted, **named), device)

    return curve(name, evaluate, len(whole), options.repeats)


def fit(value: Any, batch: int, rows: int) -> Any:
    """A tensor of `batch` items repeated and cut to `rows`; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.ndim or len(value) != batch:
        return value
    times = -(-rows // batch)
    return value.repeat(times, *[1] * (value.ndim - 1))[:rows].contiguous()


def curve(name: str, evaluate: Callable[[int], float], batch: int, repeats: int) -> dict:
    """eval(k windows) / eval(1) for k = 1..8, and the half batch of guidance split in two."""
    sizes = {"half": batch // 2} | {str(k): k * batch for k in range(1, 9)}
    found: dict[str, list[float]] = {key: [] for key in sizes}
    for rows in sizes.values():
        evaluate(rows)
    for _ in range(repeats):
        for key, rows in sizes.items():
            found[key].append(evaluate(rows))
    one = statistics.median(found["1"])
    return {
        "who": f"batch curve/{name}",
        "ms": [1e3 * t for t in found["1"]],
        "batch": batch,
        "seconds": {key: result.spread(times) for key, times in found.items()},
        "over_one": {key: statistics.median(times) / one for key, times in found.items()},
    }


def compiles(bench: Bench) -> dict:
    """Graphs compiled before and during parallel runs of a compiled denoiser."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    bench.use("FlowMatchEuler")
    plain = bench.pipe.transformer
    backend = "eager" if bench.options.dry else "inductor"
    bench.pipe.transformer = torch.compile(plain, backend=backend)
    plan = Plan(step=Steps(degree=4, windows=Fixed(warmup=1), exact_split=False))
    mesh = EchoMesh(plan.sizes, bench.device)
    try:
        bench.call(2)
        before = counters["stats"]["unique_graphs"]
        for _ in range(2):
            with under(bench, plan, mesh, 9) as work:
                work()
        after = counters["stats"]["unique_graphs"]
    finally:
        bench.pipe.transformer = plain
    return {"who": "compile", "ms": [], "graphs_before": before, "recompiles": after - before}


def compared(bench: Bench) -> list[Comparison]:
    options, found = bench.options, []
    for name in options.schedulers:
        found.append(hooks(bench, name))
        found += [replay(bench, name, degree) for degree in options.degrees]
    return found


def cases(bench: Bench) -> Iterator[list[dict]]:
    """All rows so far, after each round of the comparisons and each further row."""
    options, rows = bench.options, []
    for rows in in_rounds(compared(bench), options.pairs, bench.device, bench.use):
        yield rows
    for name in options.curves:
        rows = [*rows, dit_curve(bench) if name == "dit" else full_curve(name, options)]
        yield rows
    if options.compile:
        yield [*rows, compiles(bench)]


def summary(bench: Bench, rows: list[dict], evaluation: dict) -> dict:
    """The numbers that are asked for: worst median overhead, and the curves."""
    found: dict[str, Any] = {"evaluation_ms": 1e3 * evaluation["median"]}
    for key, (kind, measure) in MEASURES.items():
        own = [row for row in rows if row["who"].startswith(kind)]
        found[key] = {row["who"]: row[measure]["median"] for row in own}
        quiet = key.replace("_percent", "_quiet_percent")
        found[quiet] = {row["who"]: row[measure]["quiet_median"] for row in own}
    found["over_one"] = {row["who"]: row["over_one"] for row in rows if "over_one" in row}
    counted = [row["recompiles"] for row in rows if row["who"] == "compile"]
    if counted:
        found["recompiles"] = counted[0]
    return found


def words(percent: dict[str, Any]) -> str:
    quiet = percent["quiet_median"]
    more = "none quiet" if quiet is None else f"quiet {quiet:+.2f}"
    return f"{percent['median']:+.2f} % ({percent['low']:+.2f} .. {percent['high']:+.2f}, {more})"


def shown(row: dict) -> str:
    if "overhead_percent" in row:
        more = ""
        if "added_percent" in row:
            each = row["extra_ms_per_window"]
            more = f"; added {words(row['added_percent'])}, {each:.3f} ms per window"
            more += f"; beyond steps {words(row['beyond_steps_percent'])}"
        return words(row["overhead_percent"]) + more
    if "over_one" in row:
        return "  ".join(f"{key}: {value:.2f}" for key, value in row["over_one"].items())
    return f"recompiles {row['recompiles']}"


def main(options: argparse.Namespace) -> int:
    bench = Bench(options)
    bench.use("FlowMatchEuler")
    bench.call(2)
    evaluation = result.spread([bench.evaluate() for _ in range(9)])
    parameters = sum(p.numel() for p in bench.pipe.transformer.parameters())
    name = result.device_name(bench.device)
    book = result.begin("diffusion/steps-overhead", name, options.commit)
    book |= {
        "model": {"name": "class DiT", "parameters": parameters, "batch": options.batch},
        "dtype": str(bench.dtype).removeprefix("torch."),
        "evaluation_s": evaluation,
        "notes": [line for line in __doc__.splitlines()[4:] if line],
    }
    print(f"{name}: {parameters / 1e6:.1f} M, {1e3 * evaluation['median']:.1f} ms per evaluation")
    for rows in cases(bench):
        book |= {"rows": rows, "summary": summary(bench, rows, evaluation)}
        result.write(options.out, book)
    for row in book["rows"]:
        print(f"{row['who']:32} {shown(row)}", flush=True)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batch", type=int, default=192, help="pictures; twice as many rows")
    parser.add_argument("--curve-batch", type=int, default=4, help="the same in the DiT's curve")
    parser.add_argument("--pairs", type=int, default=9, help="rounds of the comparisons")
    parser.add_argument("--repeats", type=int, default=5, help="of each point of a curve")
    parser.add_argument("--degrees", default="2,4,8", help="step degrees of the replay rows")
    parser.add_argument("--schedulers", default=",".join(SCHEDULERS), help="all by default")
    parser.add_argument("--curves", default="dit", help=f"of dit, {', '.join(full_size.MODELS)}")
    parser.add_argument("--compile", action="store_true", help="count compilations too")
    parser.add_argument("--commit", default="unknown", help="recorded in the result")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args(arguments)
    options.degrees = [int(part) for part in options.degrees.split(",")]
    options.schedulers = options.schedulers.split(",")
    unknown = set(options.schedulers) - set(SCHEDULERS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(SCHEDULERS)}")
    options.curves = [part for part in options.curves.split(",") if part]
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(parse()))
