"""Windows as one batch on one device: the virtual ranks of an emulation meet in the denoiser.

Pays where a batch of W costs less than W calls: small models, where launching kernels takes the
time. Source: BatchStep of ParaStep, NeurIPS 2025 (arXiv 2505.14741), for any pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.guidance import Denoise, cut, tensors_of
from stretto.errors import UnsupportedPipeline
from stretto.mesh.local import LocalMesh


class Meeting:
    """Where one virtual rank meets the others of its window; one per rank and generation."""

    def __init__(self, mesh: LocalMesh):
        self._mesh = mesh
        self._count = 0

    def evaluate(self, call: Denoise, size: int) -> Any:
        """This rank's output of `size` calls that were evaluated in one forward pass.

        All step ranks below `size` make this call. Equal to separate calls up to the round-off of
        larger matrices. Raises UnsupportedPipeline for arguments that cannot be joined.
        """
        self._count += 1
        rank = self._mesh.rank("step")
        group = (self._mesh.rank("cfg"), self._count)
        world = self._mesh.world
        calls = world.exchange(("batched window", "step", "calls", *group), rank, call, size)
        whole = joined([calls[r] for r in range(size)]).run() if rank == 0 else None
        found = world.exchange(("batched window", "step", "output", *group), rank, whole, size)
        rows = call.batch
        return cut(found[0], size * rows, slice(rank * rows, (rank + 1) * rows))


def joined(calls: list[Denoise]) -> Denoise:
    """One call on the rows of all, in order. Raises UnsupportedPipeline."""
    first = calls[0]
    batch = first.batch
    args = tuple(_join(list(values), batch, "argument") for values in _columns(calls))
    kwargs = {
        name: _join([call.kwargs[name] for call in calls], batch, name) for name in first.kwargs
    }
    return Denoise(
        first.module, first.forward, args, kwargs, first.splits, first.never_split, first.index
    )


def _columns(calls: list[Denoise]) -> list[tuple]:
    return list(zip(*(call.args for call in calls), strict=True))


def _join(values: list, batch: int, name: str) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return _join_tensors(values, batch, name)
    if isinstance(first, dict):
        return {key: _join([v[key] for v in values], batch, name) for key in first}
    if isinstance(first, (tuple, list)) and tensors_of(first):
        return type(first)(_join(list(items), batch, name) for items in zip(*values, strict=True))
    if isinstance(first, (int, float)) and any(value != first for value in values):
        rows = [torch.tensor(value).expand(batch) for value in values]
        return torch.cat(rows)
    return first


def _join_tensors(values: list[Tensor], batch: int, name: str) -> Tensor:
    first = values[0]
    if first.ndim and first.shape[0] == batch:
        return torch.cat(values)
    if all(value is first or torch.equal(value, first) for value in values):
        return first
    if first.ndim == 0 or first.numel() == 1:
        # A timestep per call becomes one per row.
        return torch.cat([value.reshape(1).expand(batch) for value in values])
    raise UnsupportedPipeline(
        f"{name} of shape {tuple(first.shape)} differs between the steps of a window and has no "
        f"batch of {batch} rows, so the steps cannot share a forward pass; use batched=False"
    )
