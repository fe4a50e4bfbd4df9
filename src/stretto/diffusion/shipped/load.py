"""The packaged pipelines, checked before use."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import torch

from stretto.diffusion.shipped.pipeline import ClassDiTPipeline, ClassPipeline, ClassUNetPipeline
from stretto.errors import ConfigError

PIPELINES: dict[str, type[ClassPipeline]] = {"dit": ClassDiTPipeline, "unet": ClassUNetPipeline}
PROVENANCE = "provenance.json"


def load(name: str = "dit", dtype: torch.dtype = torch.float32) -> ClassPipeline:
    """A shipped pipeline: "dit" (flow matching, Fashion-MNIST) or "unet" (epsilon, DDIM).

    Weights are stored in float16 and computed in dtype. Nothing is downloaded.
    Raises ConfigError for an unknown name or weights that differ from their recorded checksum.
    """
    if name not in PIPELINES:
        raise ConfigError(f"no shipped model {name!r}: choose one of {', '.join(PIPELINES)}")
    packaged = resources.files("stretto.diffusion.shipped") / "weights" / name
    with resources.as_file(packaged) as folder:
        check(folder)
        return _open(folder, dtype)


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> ClassPipeline:
    """A pipeline of one of the two classes; weights that `shipped.train` wrote are checked.

    A folder that `save_pretrained` wrote has no provenance to hold them against. Raises
    ConfigError when the folder names no such class, or a checksum differs.
    """
    if (folder / PROVENANCE).is_file():
        check(folder)
    return _open(folder, dtype)


def _open(folder: Path, dtype: torch.dtype) -> ClassPipeline:
    # Without a dtype diffusers loads float32, whatever is stored; the name of that argument
    # differs between its versions.
    pipeline = _class_of(folder).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if dtype == torch.float32 else pipeline.to(dtype)


def _class_of(folder: Path) -> type[ClassPipeline]:
    """The pipeline class that a folder's model_index.json names. Raises ConfigError."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(f"no model_index.json in {folder}: it is no pipeline folder")
    name = json.loads(index.read_text()).get("_class_name")
    for known in PIPELINES.values():
        if known.__name__ == name:
            return known
    raise ConfigError(
        f"{index} names {name}; this loader knows "
        + ", ".join(known.__name__ for known in PIPELINES.values())
    )


def check(folder: Path) -> dict:
    """The provenance of a folder, after comparing the checksum of every weight file it names.

    Raises ConfigError, with both checksums, for a file that differs.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        raise ConfigError(
            f"no {PROVENANCE} in {folder}: it is written beside the weights; "
            "train again with python -m stretto.diffusion.shipped.train"
        )
    provenance = json.loads(file.read_text())
    for name, declared in provenance["sha256"].items():
        found = digest(folder / name)
        if found != declared:
            raise ConfigError(
                f"{folder / name} has sha256 {found}, {PROVENANCE} says {declared}: the weights "
                "are damaged or exchanged; install stretto again"
            )
    return provenance


def digest(file: Path) -> str:
    """sha256 of a file, in hex. Raises ConfigError when there is no such file."""
    if not file.is_file():
        raise ConfigError(f"no file {file}, which {PROVENANCE} names: install stretto again")
    return hashlib.sha256(file.read_bytes()).hexdigest()
