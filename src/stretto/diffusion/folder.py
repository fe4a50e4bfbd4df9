"""Opening a pipeline: the shipped ones by name, or any local diffusers folder.

`describe` reads only JSON, so that a wrong folder is refused before anything is loaded or started.
No code of the folder is ever run and no hub is asked.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from stretto.diffusion.adapters import DENOISERS
from stretto.errors import ConfigError, MissingDependency, UnsupportedPipeline

#: `shipped:dit`, or just `dit` where no folder has that name.
SHIPPED = "shipped:"
SHIPPED_CLASSES = {"dit": "ClassDiTPipeline", "unet": "ClassUNetPipeline"}
INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class Description:
    """What a pipeline is, without loading it; `folder` is None for a shipped one."""

    name: str
    class_name: str
    folder: Path | None = None

    @property
    def is_shipped(self) -> bool:
        return self.folder is None


def describe(source: str | os.PathLike[str], denoiser: str | None = None) -> Description:
    """Look at a pipeline without loading it. Raises ConfigError, UnsupportedPipeline.

    Refuses a missing folder, one without a readable model_index.json, one that wants code of its
    own to be run, one without a component that stretto knows as a denoiser, one that lacks a part.
    """
    text, folder = os.fspath(source), Path(source)
    if text.startswith(SHIPPED) or (text in SHIPPED_CLASSES and not folder.exists()):
        return _shipped(text.removeprefix(SHIPPED))
    # Unlike Path.is_dir, False for a name that is too long, and for an empty one.
    if not os.path.isdir(text):
        raise ConfigError(
            f"no folder {text or repr(text)}\n"
            "  why: pipelines are opened from local diffusers folders, nothing is downloaded\n"
            f"  to fix: an existing folder, or a shipped model: {', '.join(SHIPPED_CLASSES)}"
        )
    index = _index(folder)
    components = [k for k, v in index.items() if not k.startswith("_") and _is_present(v)]
    _refuse_own_code(folder, index)
    known = (*DENOISERS, denoiser) if denoiser else DENOISERS
    if not set(known) & set(components):
        raise UnsupportedPipeline(
            f"{folder} ({index['_class_name']}) has no denoiser that stretto recognises: looked "
            f"for {', '.join(known)} among {', '.join(components) or 'no components'}\n"
            "  to fix: name the component with --denoiser"
        )
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {', '.join(missing)}, named in its {INDEX} as parts of "
            f"{index['_class_name']}\n"
            "  to fix: complete the folder, as save_pretrained() of the pipeline writes it"
        )
    return Description(folder.resolve().name, index["_class_name"], folder)


def open_pipeline(
    source: str | os.PathLike[str] | Description = "dit",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """The pipeline on a device, without progress bars of its own. Nothing is downloaded.

    Weights of shipped pipelines are checked. Raises what `describe` does, and ConfigError when a
    part of the folder is missing or is not what its index says.
    """
    described = source if isinstance(source, Description) else describe(source)
    _quiet()
    if described.folder is None:
        from stretto.diffusion.shipped.load import load

        return load(described.name, dtype).to(device)
    return _from_folder(described, described.folder, dtype).to(device)


def check_torchvision() -> None:
    """Raise MissingDependency where a torchvision of another build breaks transformers.

    Nothing is imported here: versions are compared, and only if they look foreign to each other a
    separate process tries.
    """
    try:
        vision = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    own = metadata.version("torch")
    if vision.partition("+")[2] == own.partition("+")[2]:
        return
    trial = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    if trial.returncode:
        reason = (trial.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise MissingDependency(
            f"torchvision {vision} does not work beside torch {own}: {reason}\n"
            "  why: transformers imports it, and with it every pipeline\n"
            f"  to fix: {sys.executable} -m pip uninstall -y torchvision (stretto does not need it)"
        )


def _shipped(name: str) -> Description:
    if name not in SHIPPED_CLASSES:
        near = difflib.get_close_matches(name, SHIPPED_CLASSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"no shipped model {name!r}: there are {', '.join(SHIPPED_CLASSES)}{hint}"
        )
    return Description(name, SHIPPED_CLASSES[name])


def _index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no {INDEX}, so it is no diffusers pipeline\n"
            "  to fix: give the folder that save_pretrained() of a pipeline wrote"
        )
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ConfigError(f"{file} names no pipeline class in its key `_class_name`")
    return index


def _is_present(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _refuse_own_code(folder: Path, index: dict[str, Any]) -> None:
    """diffusers can import Python files that lie in the folder; a picture needs none."""
    own = [str(index["_class_name"])] if not isinstance(index["_class_name"], str) else []
    own += [
        f"{name}/{value[0]}.py"
        for name, value in index.items()
        if _is_present(value) and (folder / name / f"{value[0]}.py").exists()
    ]
    if own:
        raise UnsupportedPipeline(
            f"{folder} wants Python code of its own to be run: {', '.join(own)}\n"
            "  why: stretto generate runs no code that comes with weights\n"
            "  to fix: build the pipeline in Python and use stretto.parallelized"
        )


def _from_folder(described: Description, folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    if described.class_name in SHIPPED_CLASSES.values():
        from stretto.diffusion.shipped.load import load_folder

        return load_folder(folder, dtype)
    # Parts saved as absent are not found by diffusers unless it is told so.
    absent = {name: None for name, value in _index(folder).items() if value == [None, None]}
    options = {_dtype_name(DiffusionPipeline): dtype, "local_files_only": True, **absent}
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, **options)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"{folder} cannot be opened as {described.class_name}: {error}\n"
            "  to fix: see that every folder named in its model_index.json is complete, and that "
            "`stretto doctor` finds the libraries it needs"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dtype_name(kind: type) -> str:
    """diffusers renamed this argument and warns about the old name."""
    source = inspect.getsource(kind.from_pretrained)
    return "dtype" if 'kwargs.pop("dtype"' in source else "torch_dtype"


def _quiet() -> None:
    """No bars per weight file and rank, no advice to install what stretto does not need."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
