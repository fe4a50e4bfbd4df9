"""A scheduler's noise levels: on the host, as it keeps them, and once on the device it steps on.

Some schedulers send single levels to the device in every step, UniPC six of them, and the host
waits for the device each time. Copied from a grid that lies there already, nobody waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.deferred import on_device
from stretto.diffusion.kept import version_of


class _OfHost(Tensor):
    # Arithmetic is that of tensors, and so is what comes out.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    def __deepcopy__(self, memo: dict) -> Tensor:
        """A plain tensor: a scheduler that kept a level may be copied after its steps."""
        return self.clone()


class Level(_OfHost):
    """One level on the host; sent to `twin`'s device, it is copied there."""

    twin: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and args[0] == self.twin.device:
            return self.twin.clone()
        return super().to(*args, **kwargs)


class Levels(_OfHost):
    """A grid of one dim on the host, whose items are `Level`."""

    items: list[Level]

    @staticmethod
    def of(grid: Tensor, device: torch.device) -> Levels:
        """The grid, and its twin on a device, which the host does not wait for."""
        made = grid.as_subclass(Levels)
        made.items = [item.as_subclass(Level) for item in grid.unbind()]
        for item, twin in zip(made.items, on_device(grid, device).unbind(), strict=True):
            item.twin = twin
        return made

    def __getitem__(self, index: Any) -> Tensor:
        return self.items[index] if type(index) is int else super().__getitem__(index)


class Twins:
    """The grid a scheduler has, with its twin; made anew when the scheduler has another."""

    def __init__(self) -> None:
        self._grid: Tensor | None = None
        self._version: int | None = None
        self._levels: Levels | None = None

    def of(self, grid: Any, device: torch.device) -> Levels | None:
        """The same levels for steps on `device`; None where sending them there waits for nobody."""
        if device.type == "cpu" or not isinstance(grid, Tensor) or grid.ndim != 1:
            return None
        if grid.device.type != "cpu":
            return None
        if grid is not self._grid or version_of(grid) != self._version:
            self._grid, self._version = grid, version_of(grid)
            self._levels = Levels.of(grid, device)
        return self._levels
