"""Train a shipped model: `python -m stretto.diffusion.shipped.train --model dit --out FOLDER`.

Needs torch, diffusers and Pillow only, so that a bare GPU machine can run it. One seed gives one
result on one machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid

from stretto.diffusion.shipped import data
from stretto.diffusion.shipped.load import PROVENANCE, digest, load_folder
from stretto.diffusion.shipped.pipeline import ClassPipeline
from stretto.diffusion.shipped.recipe import NUM_CLASSES, Recipe
from stretto.diffusion.shipped.training import train, with_denoiser
from stretto.errors import StrettoError

log = logging.getLogger(__name__)


def write(pipeline: ClassPipeline, folder: Path, provenance: dict) -> None:
    """Write a diffusers folder with float16 weights, and provenance with their checksums."""
    half = copy.deepcopy(pipeline.denoiser).to("cpu").half()
    with_denoiser(pipeline, half).save_pretrained(folder)
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


@contextmanager
def _repeatable() -> Iterator[None]:
    """Ask CUDA for the same bits in every run; the CPU kernels of these models give them anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyrefly: ignore
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Writing NaN into every new tensor, the default of that mode, costs time and finds nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # pyrefly: ignore


def main(arguments: list[str] | None = None) -> int:
    """Command entry: 0, or 2 after logging an error that the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with _repeatable():
            run(*parse(sys.argv[1:] if arguments is None else arguments))
    except StrettoError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
