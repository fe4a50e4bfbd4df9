"""Tensors kept as they were: the tensor itself until somebody writes into it, copies after."""

from __future__ import annotations

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """A count of writes into a tensor; None in inference mode, which keeps none."""
    return None if tensor.is_inference() else tensor._version


class Watched:
    """A tensor, and whether it was written into since; inference mode does not count."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._version = version_of(tensor)

    @property
    def is_counted(self) -> bool:
        return self._version is not None

    @property
    def is_written(self) -> bool:
        """Never where writes are not counted."""
        return version_of(self.tensor) != self._version


class Kept(Watched):
    """A tensor as it was: a copy, needed only if it is written into."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor)
        self._copy = tensor.clone()

    @property
    def is_written(self) -> bool:
        """Where writes are not counted the copy tells, and the host waits for the device."""
        return super().is_written if self.is_counted else not torch.equal(self.tensor, self._copy)

    @property
    def is_untouched(self) -> bool:
        return self.is_counted and not self.is_written

    def restored(self) -> Tensor:
        """The tensor itself while it holds what it held, else a copy."""
        return self.tensor if self.is_untouched else self._copy.clone()
