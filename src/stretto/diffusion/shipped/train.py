"""Train a shipped model: `python -m stretto.diffusion.shipped.train --model dit --out FOLDER`.

Needs torch, diffusers and Pillow only, so that a bare GPU machine can run it. One seed gives one
result on one machine: every random number comes from a generator of that seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stretto.diffusion.shipped import data
from stretto.diffusion.shipped.dit import ClassDiT
from stretto.diffusion.shipped.load import PROVENANCE, digest, load_folder
from stretto.diffusion.shipped.pipeline import ClassDiTPipeline, ClassPipeline, ClassUNetPipeline
from stretto.errors import ConfigError, StrettoError

log = logging.getLogger(__name__)

NUM_CLASSES = 10
LABEL_DROP = 0.1  # The share that classifier-free guidance (2207.12598) found best.
EMA_DECAY = 0.999
WARM_UP = 500  # Steps; a tenth of a run shorter than 5000.
JUDGED = 200  # Steps that set the length of a run with a time limit; inside its warm-up.
SHIFT = 3.0  # Sampling shift of Stable Diffusion 3 (2403.03206, section 5.3.2).
DIT_ONLY = ("width", "layers", "heads")

Denoiser = Callable[..., Any]
Loss = Callable[[Denoiser, torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the machine."""

    model: str = "dit"
    data: str = "fashion"
    steps: int = 20000
    batch: int = 256
    seed: int = 0
    width: int = 128
    layers: int = 6
    heads: int = 4
    lr: float | None = None
    flip: bool = False
    compile: bool = False
    graph: bool = False

    @property
    def learning_rate(self) -> float:
        """Peak rate: as given, else 1e-3 at width 128, falling with the width above it."""
        return self.lr if self.lr is not None else 1e-3 * min(1.0, 128 / self.width)

    def command(self) -> str:
        """The command that repeats this recipe, without the paths of one machine."""
        words = ["python -m stretto.diffusion.shipped.train"]
        for name, value in asdict(self).items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words.append(f"--{name} {value}")
        return " ".join(words)


def train(
    recipe: Recipe, pictures: data.Pictures, device: torch.device, seconds: float | None = None
) -> tuple[ClassPipeline, float, Recipe]:
    """Train by recipe; returns the pipeline with averaged weights (float32), loss and recipe.

    The loss is the mean over the last hundredth of the steps. With `seconds` the number of steps
    is what fits into that time, judged by the first ones; the recipe returned names it, and
    repeats the run. Raises ConfigError for counts below 1, an unknown model, sizes that do not fit.
    """
    job = Job(recipe, pictures, device)
    start = half = time.perf_counter()
    advance = job.captured() if recipe.graph else job.advance
    while job.step < job.recipe.steps:
        job.after(advance())
        if seconds and job.step == JUDGED // 2:
            half = _now(device)
        if seconds and job.step == JUDGED:
            end = _now(device)
            pace = (end - half) / (JUDGED - JUDGED // 2)
            job.resize(JUDGED + max(1, int(0.97 * (seconds - end + start) / pace)))
    return _with_denoiser(job.pipeline, job.average), job.report.last, job.recipe


def _now(device: torch.device) -> float:
    """The host's clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Job:
    """A training under way: model, average, optimizer, data and the generator of all draws."""

    def __init__(self, recipe: Recipe, pictures: data.Pictures, device: torch.device) -> None:
        self.recipe, self.device, self.step = recipe, device, 0
        self.pipeline = build(recipe, pictures.size)
        self.model = self.pipeline.denoiser.to(device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = _optimizer(self.model, recipe, device)
        self.loss_of = _loss(self.pipeline, device)
        self.images, self.labels = pictures.images.to(device), pictures.labels.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.forward: Denoiser = torch.compile(self.model) if recipe.compile else self.model
        self.report = Report(recipe.steps)
        self._set_rate()

    def advance(self) -> torch.Tensor:
        """One step of the optimizer; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        x, y = _batch(self.images, self.labels, self.recipe, self.generator)
        with _autocast(self.device):
            loss = self.loss_of(self.forward, x, y, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def captured(self) -> Callable[[], torch.Tensor]:
        """The same step as one CUDA graph: the host launches it whole, not kernel by kernel.

        The steps that warm up and are captured count for nothing: state is put back afterwards.
        """
        if self.device.type != "cuda":
            raise ConfigError("--graph captures CUDA kernels; leave it out on this device")
        before = copy.deepcopy(self.model.state_dict())
        state = self.generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            loss = self.advance()
        self.model.load_state_dict(before)
        for held in self.optimizer.state.values():
            for tensor in held.values():
                tensor.zero_()
        self.generator.set_state(state)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay

    def after(self, loss: torch.Tensor) -> None:
        """Average, count, and set the rate of the next step."""
        _average(self.average, self.model, self.step)
        self.report.add(self.step, loss)
        self.step += 1
        self._set_rate()

    def resize(self, steps: int) -> None:
        """Change the length of the run before its rate begins to fall."""
        self.recipe = replace(self.recipe, steps=steps)
        self.report = Report(steps)
        log.info("the run takes %d steps", steps)

    def _set_rate(self) -> None:
        rate = self.recipe.learning_rate * _factor(self.step, self.recipe.steps)
        for group in self.optimizer.param_groups:
            # A tensor is read by the captured kernels; a number would be frozen into them.
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class Report:
    """Mean loss per hundredth of the run, logged; summed on the device to avoid waiting for it."""

    def __init__(self, steps: int) -> None:
        self.steps, self.every = steps, max(1, steps // 100)
        self.sum: torch.Tensor | float = 0.0
        self.count, self.last, self.start = 0, math.nan, time.perf_counter()

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Count one step's loss, and log at the end of an interval."""
        self.sum, self.count = self.sum + loss, self.count + 1
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        self.last = float(self.sum) / self.count
        self.sum, self.count = 0.0, 0
        seconds = time.perf_counter() - self.start
        log.info("step %d of %d: loss %.5f, %.1f s", step + 1, self.steps, self.last, seconds)


def build(recipe: Recipe, size: int) -> ClassPipeline:
    """An untrained pipeline for pictures of size x size; the weights depend on the seed only."""
    if min(recipe.steps, recipe.batch) < 1:
        raise ConfigError(f"{recipe.steps} steps of batch {recipe.batch}: both must be 1 or more")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if recipe.model == "dit":
            return _dit(recipe, size)
        if recipe.model == "unet":
            return _unet(recipe, size)
    raise ConfigError(f"no model {recipe.model!r}: choose dit or unet")


def _dit(recipe: Recipe, size: int) -> ClassDiTPipeline:
    transformer = ClassDiT(
        sample_size=size,
        width=recipe.width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        num_classes=NUM_CLASSES,
    )
    transformer.initialize()
    return ClassDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=SHIFT))


def _unet(recipe: Recipe, size: int) -> ClassUNetPipeline:
    changed = [f for f in DIT_ONLY if getattr(recipe, f) != getattr(Recipe, f)]
    if changed:
        raise ConfigError(
            f"--{', --'.join(changed)} with --model unet: its size is fixed at 0.57 M parameters, "
            "so that it ships in 1.2 MB; leave these out or take --model dit"
        )
    unet = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=NUM_CLASSES + 1,
    )
    # Clipping would put a kink into the trajectory that step-parallel prediction extrapolates.
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return ClassUNetPipeline(unet, scheduler)


def _loss(pipeline: ClassPipeline, device: torch.device) -> Loss:
    if isinstance(pipeline, ClassDiTPipeline):
        return flow_loss
    return partial(epsilon_loss, abar=pipeline.scheduler.alphas_cumprod.to(device))


def flow_loss(
    model: Denoiser, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the velocity, at logit-normal noise levels.

    x is (B, C, H, W) in [-1, 1], y (B,) labels; a tenth of them become the null class.
    Source: Scaling Rectified Flow Transformers, 2403.03206, section 3.1 (location 0, scale 1).
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    sigma = torch.randn(len(x), generator=generator, device=x.device).sigmoid()
    s = sigma[:, None, None, None]
    velocity = model((1 - s) * x + s * noise, sigma * 1000, _dropped(y, generator)).sample
    return torch.nn.functional.mse_loss(velocity.float(), noise - x)


def epsilon_loss(
    model: Denoiser,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    abar: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the noise, at uniform timesteps of the grid abar (signal power).

    Source: Denoising Diffusion Probabilistic Models, 2006.11239, equation 14.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    t = torch.randint(len(abar), (len(x),), generator=generator, device=x.device)
    a = abar[t][:, None, None, None]
    epsilon = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, _dropped(y, generator)).sample
    return torch.nn.functional.mse_loss(epsilon.float(), noise)


def _dropped(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    dropped = torch.rand(len(y), generator=generator, device=y.device) < LABEL_DROP
    return torch.where(dropped, NUM_CLASSES, y)


def _batch(
    images: torch.Tensor, labels: torch.Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    device = images.device
    rows = torch.randint(len(images), (recipe.batch,), generator=generator, device=device)
    x = images[rows]
    if recipe.flip:
        flipped = torch.rand(recipe.batch, generator=generator, device=device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    return x, labels[rows]


def _optimizer(
    model: torch.nn.Module, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    rate = recipe.learning_rate
    return torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(rate, device=device) if recipe.graph else rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=device.type == "cuda",
        capturable=recipe.graph,
    )


def _factor(step: int, steps: int) -> float:
    """Learning rate over its peak: a linear warm-up, then half a cosine down to zero."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def _average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the running mean; early on it forgets faster, else it would keep the first weights."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(model.parameters()), None)


def _autocast(device: torch.device) -> AbstractContextManager:
    # Casts kept between steps would be those of the captured weights.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    )


def _with_denoiser(pipeline: ClassPipeline, denoiser: torch.nn.Module) -> ClassPipeline:
    return type(pipeline)(denoiser, pipeline.scheduler)


def write(pipeline: ClassPipeline, folder: Path, provenance: dict) -> None:
    """Write a diffusers folder with float16 weights, and provenance with their checksums."""
    half = copy.deepcopy(pipeline.denoiser).to("cpu").half()
    _with_denoiser(pipeline, half).save_pretrained(folder)
    weights = sorted(folder.rglob("*.safetensors"))
    sums = {file.relative_to(folder).as_posix(): digest(file) for file in weights}
    (folder / PROVENANCE).write_text(json.dumps({**provenance, "sha256": sums}, indent=2) + "\n")


def describe(
    recipe: Recipe, pictures: data.Pictures, device: torch.device, loss: float, seconds: float
) -> dict:
    """Where weights come from: data, command, seed, machine, result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "model": recipe.model,
        "data": pictures.source,
        "data_sha256": pictures.sha256,
        "command": recipe.command(),
        "seed": recipe.seed,
        "final_loss": round(loss, 6),
        "seconds": round(seconds, 1),
        "device": name,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def sample_grid(folder: Path, file: Path, device: torch.device, columns: int) -> None:
    """Draw pictures with the written weights into one PNG, a row per class, to be looked at."""
    pipeline = load_folder(folder).to(device)
    labels = [label for label in range(NUM_CLASSES) for _ in range(columns)]
    generator = torch.Generator(device).manual_seed(1)
    arrays = pipeline(labels, generator=generator, output_type="np").images
    images = VaeImageProcessor.numpy_to_pil(arrays)
    make_image_grid([image.convert("RGB") for image in images], NUM_CLASSES, columns).save(file)


def current_commit() -> str:
    """The commit of this source tree, or "unknown" outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parse(arguments: list[str]) -> tuple[Recipe, argparse.Namespace]:
    """The recipe, and what does not change the weights: device, paths, commit, note."""
    parser = argparse.ArgumentParser(prog="stretto.diffusion.shipped.train", description=__doc__)
    parser.add_argument("--model", choices=["dit", "unet"], default="dit")
    parser.add_argument("--data", choices=["fashion", "digits"], default="fashion")
    for name in ("steps", "batch", "seed", "width", "layers", "heads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name))
    parser.add_argument("--lr", type=float, help="peak rate; default 1e-3, less above width 128")
    parser.add_argument("--flip", action="store_true", help="random horizontal flips")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--graph", action="store_true", help="one CUDA graph per step")
    parser.add_argument("--seconds", type=float, help="as many steps as fit into this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", type=Path, help="folder of the idx .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--columns", type=int, default=8, help="OUT-grid.png: pictures per class")
    parser.add_argument("--commit", help="recorded commit; default asks git")
    parser.add_argument("--note", help="a sentence for the provenance")
    options = parser.parse_args(arguments)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    return recipe, options


def run(recipe: Recipe, options: argparse.Namespace) -> None:
    """Train, write the folder, draw the grid."""
    device = torch.device(options.device)
    pictures = data.load(recipe.data, options.data_dir)
    # Asked before training, because the tree may have moved on at its end.
    commit = options.commit or current_commit()
    start = time.perf_counter()
    pipeline, loss, recipe = train(recipe, pictures, device, options.seconds)
    provenance = describe(recipe, pictures, device, loss, time.perf_counter() - start)
    provenance["commit"] = commit
    if options.note:
        provenance["note"] = options.note
    write(pipeline, options.out, provenance)
    log.info("wrote %s", options.out)
    if options.columns:
        grid = options.out.with_name(options.out.name + "-grid.png")
        sample_grid(options.out, grid, device, options.columns)
        log.info("wrote %s", grid)


def _repeatable() -> None:
    """Ask CUDA for the same bits in every run; the CPU kernels of these models give them anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Writing NaN into every new tensor, the default of that mode, costs time and finds nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore


def main(arguments: list[str] | None = None) -> int:
    """Command entry: 0, or 2 after logging an error that the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _repeatable()
    try:
        run(*parse(sys.argv[1:] if arguments is None else arguments))
    except StrettoError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
