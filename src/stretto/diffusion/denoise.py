"""One call of a denoiser: its arguments, its form, its parts along the batch, its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.errors import SplitMismatch

#: Arguments that hold no batch although their dim 0 may coincide with it.
NEVER_SPLIT = frozenset(
    {"image_rotary_emb", "img_ids", "txt_ids", "freqs_cis", "ids", "rotary_emb", "video_ids"}
)


@dataclass
class Denoise:
    """One call of a denoiser: which module, which call of it in this step, its arguments."""

    module: str
    forward: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    splits: bool = True
    never_split: frozenset[str] = NEVER_SPLIT
    index: int = 0

    @property
    def key(self) -> tuple:
        """Equal for calls whose outputs have equal form."""
        shapes = [(t.shape, t.dtype) for t in tensors_of((self.args, self.kwargs))]
        return (self.module, self.index, *shapes)

    @property
    def batch(self) -> int:
        """Dim 0 of the latent argument: the first tensor that is more than a table."""
        for tensor in tensors_of((self.args, self.kwargs)):
            if tensor.ndim >= 3:
                return tensor.shape[0]
        return 1

    def run(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def chunk(self, index: int, chunks: int) -> Denoise:
        """The same call on one of `chunks` equal contiguous parts of the batch."""
        batch = self.batch
        size = batch // chunks
        part = slice(index * size, (index + 1) * size)
        kwargs = {
            name: value if name in self.never_split else cut(value, batch, part)
            for name, value in self.kwargs.items()
        }
        args = tuple(cut(value, batch, part) for value in self.args)
        return Denoise(
            self.module, self.forward, args, kwargs, self.splits, self.never_split, self.index
        )


class Passes:
    """Forward passes of one rank: their number, and the check of batches that are cut.

    `verified` holds modules whose rows were found independent; others are checked at their first
    cut, whole against cut. `checks` counts those passes, which no plan asks for.
    """

    def __init__(self, verified: set[str]):
        self.count = self.checks = 0
        self._verified = verified

    def make(self, call: Denoise) -> Any:
        """The output of a call, evaluated here."""
        self.count += 1
        return call.run()

    def checked(self, call: Denoise, cut_output: Any) -> Any:
        """`cut_output`, held once per module against the whole call. Raises SplitMismatch."""
        if call.module in self._verified:
            return cut_output
        self.checks += 1
        if check_split(call, cut_output):
            self._verified.add(call.module)
        return cut_output


def check_split(call: Denoise, split: Any) -> bool:
    """Hold a cut evaluation against the whole one; whether it could be. Raises SplitMismatch.

    An output that is not finite compares with nothing; its prediction is refused for that.
    """
    whole = call.run()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(whole)):
        return False
    for a, b in zip(tensors_of(whole), tensors_of(split), strict=True):
        limit = torch.finfo(a.dtype).eps ** 0.5
        error = float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-30))
        if not error <= limit:
            raise SplitMismatch(
                f"{call.module}: cutting the batch of {call.batch} changes its output by "
                f"{error:.2g} (relative, limit {limit:.2g}), so its rows depend on one another; "
                "use cfg=1 and Steps(exact_split=False)"
            )
    return True


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    return []


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        fields = {key: mapped(change, item) for key, item in value.items()}
        return type(value)(**fields) if type(value) is not dict else fields
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(change, item) for item in value)
    return value


def cut(value: Any, batch: int, part: slice) -> Any:
    """The rows `part` of everything whose dim 0 (or length, for plain lists) is the batch."""
    if isinstance(value, list) and len(value) == batch and not tensors_of(value):
        return value[part]
    return mapped(lambda t: t[part] if t.ndim and t.shape[0] == batch else t, value)
