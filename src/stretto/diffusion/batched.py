"""Windows as one batch on one device: the virtual ranks of an emulation meet in the denoiser.

Pays where a batch of W costs less than W calls: small models, where launching kernels takes the
time. Source: BatchStep of ParaStep, NeurIPS 2025 (arXiv 2505.14741), for any pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.denoise import Denoise, cut, tensors_of
from stretto.errors import UnsupportedPipeline
from stretto.mesh.local import LocalMesh


class Meeting:
    """Where one virtual rank meets the others of its window; one per rank and generation."""

    def __init__(self, mesh: LocalMesh):
        self._mesh = mesh
        self._window, self._count = -1, 0

    def evaluate(self, call: Denoise, start: int, size: int) -> Any:
        """This rank's output of `size` calls that were evaluated in one forward pass.

        All step ranks below `size` make this call. Equal to separate calls up to the round-off of
        larger matrices. Raises UnsupportedPipeline for calls that cannot be joined.
        """
        rank = self._mesh.rank("step")
        calls = self._meet("calls", start, size, call)
        _check_alike(calls, start)
        whole = joined([calls[r] for r in range(size)]).run() if rank == 0 else None
        found = self._meet("output", start, size, whole)
        rows = call.batch
        return cut(found[0], size * rows, slice(rank * rows, (rank + 1) * rows))

    def leave(self, start: int, size: int) -> None:
        """After this rank's last call of a window: nobody may still wait for one more."""
        _check_alike(self._meet("calls", start, size, None), start)

    def _meet(self, what: str, start: int, size: int, value: Any) -> dict:
        # Counted per window: ranks beyond a short window do not come to its meetings.
        if start != self._window:
            self._window, self._count = start, 0
        self._count += what == "calls"
        key = ("batched window", "step", what, self._mesh.rank("cfg"), start, self._count)
        return self._mesh.world.exchange(key, self._mesh.rank("step"), value, size)


def _check_alike(calls: dict[int, Denoise | None], start: int) -> None:
    """All ranks of a window must call the same module with arguments of the same form."""
    forms = {None if call is None else (call.key, tuple(call.kwargs)) for call in calls.values()}
    if len(forms) > 1:
        names = sorted({"no module" if c is None else c.module for c in calls.values()})
        raise UnsupportedPipeline(
            f"the {len(calls)} steps from step {start} on make unlike denoiser calls "
            f"({', '.join(names)}), so they cannot share a forward pass; use batched=False"
        )


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
