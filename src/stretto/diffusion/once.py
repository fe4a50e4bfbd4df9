"""Equal evaluations of virtual ranks, made once: what one device plays twice costs it twice.

Every rank evaluates an exact step that is not shared out, on equal latents. An emulation that is
after the result, not after the calls, may hand out the first rank's output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.denoise import mapped, tensors_of

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
#: Calls that are remembered: the branches of one step, where a pipeline calls once per branch.
_NUM_KEPT = 4


class Once:
    """The last evaluations of a pipeline's denoisers, shared by its virtual ranks."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[tuple[Any, Any]]] = {}

    def wrapped(self, module: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, not called again for arguments that are equal to those of a recent call.

        For denoisers that give equal bits for equal arguments: a network in evaluation mode.
        """
        kept = self._kept.setdefault(module, deque(maxlen=_NUM_KEPT))

        def once(*args: Any, **kwargs: Any) -> Any:
            for arguments, output in kept:
                if _equal(arguments, (args, kwargs)):
                    return _copied(output)
            # Cloned, because pipelines and schedulers write into what they got and what they gave.
            arguments, output = _copied((args, kwargs)), forward(*args, **kwargs)
            kept.append((arguments, _copied(output)))
            return output

        return once


def _copied(value: Any) -> Any:
    return mapped(lambda tensor: tensor.clone(), value)


def _equal(a: Any, b: Any) -> bool:
    """Equality of nested arguments, tensors to the last bit."""
    ours, theirs = tensors_of(a), tensors_of(b)
    if len(ours) != len(theirs) or _shape(a) != _shape(b):
        return False
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(ours, theirs, strict=True)
    )


def _shape(value: Any) -> Any:
    """The nesting and everything in it but the tensors; objects count as themselves."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict):
        return {name: _shape(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_shape(item) for item in value]
    return value if isinstance(value, _VALUES) else id(value)
