"""Tensors kept as they were: the tensor itself until somebody writes into it, copies after."""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """A count of writes into a tensor; None in inference mode, which keeps none."""
    return None if tensor.is_inference() else tensor._version


class Kept:
    """A tensor as it was: a copy, needed only if it is written into."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self._version = version_of(tensor)
        self._copy = tensor.clone()

    @property
    def is_untouched(self) -> bool:
        return self._version is not None and version_of(self._tensor) == self._version

    def restored(self) -> Tensor:
        """The tensor itself while it holds what it held, else a copy."""
        return self._tensor if self.is_untouched else self._copy.clone()
