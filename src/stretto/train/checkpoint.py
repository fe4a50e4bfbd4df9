"""Checkpoints that any number of ranks can read, written whole or not at all.

A folder `step-N` holds torch.distributed.checkpoint's files and `state.json`. It is written as
`step-N.tmp` and renamed once all ranks have saved; what still ends in `.tmp` is ignored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from stretto.errors import ConfigError
from stretto.mesh.mesh import Mesh

log = logging.getLogger(__name__)

STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")
_METADATA = ".metadata"
#: What unpickling of anything may raise.
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    ImportError,
    TypeError,
    pickle.UnpicklingError,
)
#: A message names at most this many keys.
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint and what its `state.json` says."""

    path: Path
    step: int
    state: dict[str, Any]


def newest(folder: Path, *, warn: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint of a folder; incomplete ones are named in a warning."""
    found = _complete_ones(folder)
    whole = {path for _, path in found}
    for path in sorted(set(folder.glob("step-*")) - whole) if warn else ():
        log.warning("%s is no complete checkpoint and is ignored", path)
    return opened(max(found)[1]) if found else None


def _complete_ones(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what has the name and the files of a complete checkpoint."""
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*")]
    return [
        (int(name[1]), path)
        for path, name in names
        if name and (path / STATE).is_file() and (path / _METADATA).is_file()
    ]


def opened(path: Path) -> Checkpoint:
    """A complete checkpoint. Raises ConfigError when its state cannot be read, or is no state."""
    state = _read_state(path / STATE)
    return Checkpoint(path, state["step"], state)


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file.parent, f"{STATE}: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise _unreadable(file.parent, f"{STATE} does not say which step it is of")
    return state


def _unreadable(path: Path, cause: str) -> ConfigError:
    return ConfigError(
        f"cannot read {path}: {cause}\n"
        "  why: it was damaged after it was written; a folder gets this name when it is complete\n"
        "  to fix: remove it; an older checkpoint beside it is then the newest"
    )


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _metadata(path: Path) -> Mapping[str, Any]:
    """What a checkpoint says of its tensors, by name. Raises ConfigError."""
    try:
        return dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except _DAMAGED as error:
        raise _unreadable(path, f"{_METADATA}: {_said(error)}") from None


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    mesh: Mesh,
    *,
    keep: int = 2,
) -> Path:
    """Write `step-N` and remove all before it but the newest `keep`; the path. All ranks call it.

    Raises ConfigError on every rank (a full disk, no permission); then the checkpoints that were
    there are untouched.
    """
    whole, aside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    first = mesh.world_rank == 0
    # Told to all before they save together: a rank that stayed away would leave the others there.
    problem = mesh.broadcast_bytes((_prepare(aside) if first else "").encode()).decode()
    problem = problem or _write(aside, dict(tensors), mesh)
    if first and not problem:
        problem = _complete(aside, whole, {"step": step, **state})
    told = [part.decode() for part in mesh.gather_bytes(problem.encode())]
    if any(told):
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise ConfigError(
            f"cannot save step {step} in {folder}: {next(filter(None, told))}\n"
            "  to fix: free space there or give another --out; earlier checkpoints are untouched"
        )
    if first:
        _forget(folder, step, keep)
    return whole


def _prepare(aside: Path) -> str:
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _write(aside: Path, tensors: dict[str, torch.Tensor], mesh: Mesh) -> str:
    """Save this rank's shards, together with all ranks; what went wrong, else ""."""
    try:
        with _quiet():
            dcp.save(tensors, checkpoint_id=aside, no_dist=mesh.world_size == 1)
    except CheckpointException as error:
        return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
    except OSError as error:
        return str(error)
    return ""


def _complete(aside: Path, whole: Path, state: dict[str, Any]) -> str:
    """Everybody has saved: say so by the name. A rename is seen whole or not at all."""
    try:
        with (aside / STATE).open("w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(whole, ignore_errors=True)
        aside.rename(whole)
    except OSError as error:
        return str(error)
    return ""


def _forget(folder: Path, step: int, keep: int) -> None:
    """Remove complete checkpoints up to `step`, all but the newest `keep`.

    What is no checkpoint counts for none that is kept, and later steps are another run's.
    """
    done = sorted(each for each in _complete_ones(folder) if each[0] <= step)
    for _, path in done[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def load(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """Read a checkpoint into `tensors`, in place, whatever ranks wrote it.

    Raises ConfigError naming the keys that only one side has, or whose shapes differ.
    """
    path = checkpoint.path
    _compare(path, _metadata(path), tensors)
    try:
        with _quiet():
            dcp.load(
                tensors,
                storage_reader=dcp.FileSystemReader(path),
                no_dist=mesh.world_size == 1,
            )
    except CheckpointException as error:
        causes = (f"rank {rank}: {_said(cause[0])}" for rank, cause in error.failures.items())
        raise _unreadable(path, "; ".join(causes)) from None
    except OSError as error:
        raise _unreadable(path, str(error)) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch remarks on every call of one process that it is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def saved_keys(checkpoint: Checkpoint) -> set[str]:
    """Names of all tensors in a checkpoint. Raises ConfigError."""
    return set(_metadata(checkpoint.path))


def _compare(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(key for key in wanted if key not in saved)
    extra = sorted(key for key in saved if key not in wanted and not key.startswith("random."))
    shapes = [
        f"{key}: {tuple(saved[key].size)} there, {tuple(tensor.shape)} here"
        for key, tensor in wanted.items()
        if key in saved and tuple(saved[key].size) != tuple(tensor.shape)
    ]
    lines = [
        f"{what}: {', '.join(keys[:_SHOWN])}" + (f" and {len(keys) - _SHOWN} more" * (n > _SHOWN))
        for what, keys in (
            ("only in the model", missing),
            ("only in the checkpoint", extra),
            ("of other shape", shapes),
        )
        if (n := len(keys))
    ]
    if lines:
        raise ConfigError(
            f"{path} holds another model or optimizer\n  "
            + "\n  ".join(lines)
            + "\n  to fix: train the model that was saved, or give another --out"
        )


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state by name, sharing memory with what is trained.

    The optimizer's state must exist: it does after a step, or after `begin_state`.
    """
    found: dict[str, torch.Tensor] = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if isinstance(value, torch.Tensor):
                found[f"optimizer.{names[parameter]}.{key}"] = value
    return found


def begin_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: set[str]) -> None:
    """Give the optimizer the state it would have before its first step, zeros.

    `saved`: keys of the checkpoint that is to be read. A parameter that no loss has used yet has
    no state, there and here; where none has any, all are given one.
    """
    used = {key.removeprefix("optimizer.").rpartition(".")[0] for key in saved if _is_state(key)}
    rates = [group["lr"] for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    for name, parameter in model.named_parameters():
        if name in used or not used:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate, decay in zip(optimizer.param_groups, rates, decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
    for kept in optimizer.state.values():
        for value in kept.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def _is_state(key: str) -> bool:
    return key.startswith("optimizer.")


def random_state(mesh: Mesh) -> dict[str, torch.Tensor]:
    """This rank's default generators, under names of this rank."""
    found = {f"random.{mesh.world_rank}.cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        found[f"random.{mesh.world_rank}.cuda"] = torch.cuda.get_rng_state(mesh.device)
    return found


def set_random_state(found: Mapping[str, torch.Tensor], mesh: Mesh) -> None:
    torch.set_rng_state(found[f"random.{mesh.world_rank}.cpu"])
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(found[f"random.{mesh.world_rank}.cuda"], mesh.device)
