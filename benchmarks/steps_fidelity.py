"""Fidelity against depth on a DiT trained here: published schedule, tail, and fewer plain steps.

python benchmarks/steps_fidelity.py --data-dir FASHION_MNIST --minutes 4 --out fidelity.json [--dry]

Trains the class-conditional DiT of stretto.diffusion.shipped.train at 20-60 M parameters, then
generates with virtual ranks (`emulate`: bitwise what ranks compute) and holds every result against
the sequential one of as many steps, in float32. Seeds are those of no training picture; nothing is
calibrated, so every class is held out. Also stated: the distance to ten times as many steps, since
a solver of higher order leaves the sequential result for the true solution.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import full_size
import result
import torch

from stretto import Plan, Steps
from stretto.diffusion import quality
from stretto.diffusion.api import emulate
from stretto.diffusion.shipped import data, train
from stretto.errors import PlanMismatch
from stretto.plan.options import Fixed, Parastep, Tail
from stretto.search.windows import least_depth, published

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
#: Warm-ups of the published schedule, each giving one depth.
WARMUPS = (1, 2, 5, 9, 13)


class Bench:
    """A trained pipeline, fixed starting noise, and the numbers that come out of it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device("cpu" if options.dry else "cuda")
        self.pipe, self.training = trained(options, self.device)
        self.pipe.set_progress_bar_config(disable=True)
        size = self.pipe.transformer.config.sample_size
        self.labels = [k % 10 for k in range(options.batch)]
        # Per picture a generator of its own, from seeds that training does not use.
        drawn = [full_size.draw(10_000 + k, 1, size, size) for k in range(options.batch)]
        self.latents = torch.stack(drawn).to(self.device)

    def use(self, kind: str, shift: float) -> None:
        """A flow-matching solver by class name, on the grid of this shift."""
        import diffusers

        flow = kind == "FlowMatchEulerDiscreteScheduler"
        config = {"shift": shift} if flow else {**FLOW, "flow_shift": shift}
        self.pipe.scheduler = getattr(diffusers, kind)(**config)

    def call(self, steps: int) -> torch.Tensor:
        return self.pipe(
            self.labels,
            num_inference_steps=steps,
            guidance_scale=self.options.guidance,
            latents=self.latents,
            output_type="latent",
        ).images.cpu()

    def parallel(self, degree: int, windows: Any, steps: int) -> tuple[torch.Tensor, Any]:
        plan = Plan(step=Steps(degree=degree, windows=windows))
        with emulate(self.pipe, plan) as run:
            return self.call(steps), run.report

    def halves(self, steps: int) -> torch.Tensor:
        """Sequential, with the batch in two parts: what differs is rounding."""
        labels, latents = self.labels, self.latents
        half, parts = len(labels) // 2, []
        try:
            for part in (slice(0, half), slice(half, None)):
                self.labels, self.latents = labels[part], latents[part]
                parts.append(self.call(steps))
        finally:
            self.labels, self.latents = labels, latents
        return torch.cat(parts)


def trained(options: argparse.Namespace, device: torch.device) -> tuple[Any, dict]:
    """A DiT trained for `options.minutes`, or for a number of steps; and where it comes from."""
    recipe = train.Recipe(
        data=options.data,
        batch=options.train_batch,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        graph=device.type == "cuda",
        **({"steps": options.train_steps} if options.train_steps else {}),
    )
    pictures = data.load(options.data, options.data_dir)
    seconds = None if options.train_steps else 60 * options.minutes
    start = time.perf_counter()
    pipe, loss, recipe = train.train(recipe, pictures, device, seconds)
    result.synchronise(device)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    facts = train.describe(recipe, pictures, device, loss, time.perf_counter() - start)
    print(f"{parameters / 1e6:.1f} M parameters, loss {loss:.4f}, {facts['seconds']} s", flush=True)
    if options.save:
        train.write(pipe, options.save, {**facts, "commit": options.commit})
    return pipe.to(device, torch.float32), {**facts, "parameters": parameters}


def depths(steps: int, degree: int) -> list[int]:
    """Depths of the curve: those of the published schedule at its warm-ups, least first."""
    return sorted({len(published(steps, degree, w)) for w in WARMUPS if w < steps})


def rows(bench: Bench) -> Iterator[dict]:
    """Every grid, degree, schedule and depth, each against its own sequential result."""
    options = bench.options
    for shift in options.shifts:
        for steps in options.steps:
            bench.use("FlowMatchEulerDiscreteScheduler", shift)
            reference = bench.call(steps)
            grid = Grid(bench, steps, shift, reference, fine=bench.call(10 * steps))
            yield grid.row("sequential", steps, reference)
            yield grid.row("sequential, batch in halves", steps, bench.halves(steps))
            for degree in options.degrees:
                yield from curve(grid, degree)
            yield from plain(grid, sorted({d for p in options.degrees for d in depths(steps, p)}))


class Grid:
    """One noise grid with its sequential result and a finer solution."""

    def __init__(
        self, bench: Bench, steps: int, shift: float, reference: torch.Tensor, fine: torch.Tensor
    ):
        self.bench, self.steps, self.shift = bench, steps, shift
        self.reference, self.fine = reference, fine

    def row(self, who: str, depth: int, images: torch.Tensor, **more: Any) -> dict:
        """Distances of a result; range 2, because pictures lie in [-1, 1]. None: equal bits.

        Of the mean square one picture that takes another turn is nearly all; the average is that
        of the pictures' decibels.
        """
        found = quality.psnr(images, self.reference, data_range=2.0)
        equal = torch.equal(images, self.reference)
        return {
            "who": who,
            "ms": [],
            "steps": self.steps,
            "shift": self.shift,
            "depth": depth,
            "psnr_db": None if equal else round(found.mean, 3),
            "psnr_average_db": None if equal else round(found.average, 3),
            "psnr_worst_item_db": None if equal else round(found.worst_item, 3),
            "relative_l2": quality.relative_l2(images, self.reference),
            "psnr_to_fine_db": round(quality.psnr(images, self.fine, data_range=2.0).mean, 3),
            **more,
        }


def curve(grid: Grid, degree: int) -> Iterator[dict]:
    """parastep, tail, and warm-up with newest reuse, at every depth of the curve."""
    schedules = [("parastep", w, Parastep(warmup=w)) for w in WARMUPS if w < grid.steps]
    for depth in depths(grid.steps, degree):
        if depth >= least_depth(grid.steps, degree):
            schedules.append(("tail", None, Tail(depth=depth)))
    if grid.steps > 5:
        schedules.append(("parastep windows, damped", 5, Fixed(warmup=5)))
    for who, warmup, windows in schedules:
        try:
            images, report = grid.bench.parallel(degree, windows, grid.steps)
        except PlanMismatch as error:
            print(f"left out {who} at degree {degree}: {error}", flush=True)
            continue
        yield grid.row(
            who,
            report.depth,
            images,
            degree=degree,
            warmup=warmup,
            windows=list(report.sizes),
            ceiling=report.ceiling,
            worst_guess=report.worst_discrepancy,
        )


def plain(grid: Grid, counts: list[int]) -> Iterator[dict]:
    """What one device does in as many evaluations: the same solver, and two of second order."""
    solvers = ("FlowMatchEuler", "UniPCMultistep", "DPMSolverMultistep")
    for solver in solvers:
        kind = f"{solver}{'Discrete' if solver.startswith('Flow') else ''}Scheduler"
        grid.bench.use(kind, grid.shift)
        for count in counts:
            who = "fewer steps" if solver == solvers[0] else f"fewer steps, {solver}"
            yield grid.row(who, count, grid.bench.call(count))


def summary(found: list[dict]) -> dict[str, list[dict]]:
    """Beside one another at equal depth: by the mean square of all pictures, and on average."""
    levels = ("psnr_db", "psnr_average_db")
    return {f"equal_depth_{level}": at_equal_depth(found, level) for level in levels}


def at_equal_depth(found: list[dict], level: str) -> list[dict]:
    """At each grid, degree and depth that both have: tail beside parastep and fewer steps."""
    lines = []
    for tail in (row for row in found if row["who"] == "tail"):
        same = [
            row
            for row in found
            if all(row[key] == tail[key] for key in ("steps", "shift", "depth"))
            and row.get("degree", tail["degree"]) == tail["degree"]
        ]
        line = {key: tail[key] for key in ("steps", "shift", "degree", "depth", "ceiling")}
        lines.append(line | {row["who"]: row[level] for row in same})
    return lines


def main(options: argparse.Namespace) -> int:
    begun = time.time()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # Full float32: the differences measured are below what TF32 rounds away.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    bench = Bench(options)
    book = result.begin(
        "diffusion/steps-fidelity", result.device_name(bench.device), options.commit
    )
    book |= {
        "training": bench.training,
        "pictures": options.batch,
        "guidance": options.guidance,
        "dtype": "float32",
        "notes": [line for line in __doc__.splitlines()[4:] if line],
    }
    for row in rows(bench):
        book["rows"].append(row)
        book["summary"] = summary(book["rows"])
        result.write(options.out, book)
        print(shown(row), flush=True)
        if time.time() - begun > options.budget_s:
            print("out of time; the rows so far stand", flush=True)
            break
    return 0


def shown(row: dict) -> str:
    psnr = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    where = f"N {row['steps']:3} shift {row['shift']:g} p {row.get('degree', 1)}"
    fine = f"to fine {row['psnr_to_fine_db']:.1f}"
    return f"{where} depth {row['depth']:3}  {psnr:>9}  {fine}  {row['who']}"


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data", choices=["fashion", "digits"], default="fashion")
    parser.add_argument("--data-dir", type=Path, help="folder of the Fashion-MNIST idx .gz files")
    parser.add_argument("--minutes", type=float, default=4, help="of training, about")
    parser.add_argument("--train-steps", type=int, help="instead of --minutes")
    parser.add_argument("--train-batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="pictures that are compared")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=numbers(int), default=[50, 28, 20])
    parser.add_argument("--shifts", type=numbers(float), default=[3.0, 1.0])
    parser.add_argument("--degrees", type=numbers(int), default=[8, 4, 2])
    parser.add_argument("--save", type=Path, help="also write the trained pipeline here")
    parser.add_argument("--budget-s", type=float, default=540, help="training included")
    parser.add_argument("--commit", default="unknown", help="recorded in the result")
    parser.add_argument("--dry", action="store_true", help="on the CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse()))
