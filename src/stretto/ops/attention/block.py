"""Blocks: tensors over the same rows that travel together, as one message without copies.

Storage is rows outermost, (rows, batch, heads, dim), so a run of rows is a run of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stretto.plan.ranges import Spans

#: Of every tensor of a block: the shape of one row, and the dtype.
Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Block:
    """`parts` by name, (rows, ...) each and contiguous, views of `buffer` one after the other.

    `rows`: the global positions that the rows stand for, ascending.
    """

    rows: Spans
    buffer: Tensor
    parts: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    @classmethod
    def empty(cls, rows: Spans, specs: Specs, device: torch.device | str) -> Block:
        """Memory for these rows, not yet written."""
        size = rows.rows * sum(_row_bytes(*spec) for spec in specs.values())
        return cls.over(rows, torch.empty(size, dtype=torch.uint8, device=device), specs)

    @classmethod
    def over(cls, rows: Spans, buffer: Tensor, specs: Specs) -> Block:
        """The block that lies in a buffer."""
        count = rows.rows
        sizes = {name: count * _row_bytes(*spec) for name, spec in specs.items()}
        # Statistics last, so that q, k and v begin where kernels can load runs of 16 bytes, unless
        # that leaves the statistics at an address they cannot be read from.
        order = sorted(specs, key=lambda name: (specs[name][1].itemsize, name))
        widest = max(dtype.itemsize for _, dtype in specs.values())
        if any(sizes[name] % widest for name in order):
            order.reverse()
        parts, offset = {}, 0
        for name in order:
            shape, dtype = specs[name]
            part = buffer[offset : offset + sizes[name]]
            parts[name] = part.view(dtype).view(count, *shape)
            offset += sizes[name]
        return cls(rows, buffer, parts)

    @classmethod
    def of(cls, rows: Spans, tensors: Mapping[str, Tensor], **dtypes: torch.dtype) -> Block:
        """A copy of tensors (rows, ...) of any strides, in `dtypes` where given."""
        specs = {n: (tuple(t.shape[1:]), dtypes.get(n, t.dtype)) for n, t in tensors.items()}
        block = cls.empty(rows, specs, next(iter(tensors.values())).device)
        block.take(rows, tensors)
        return block

    @classmethod
    def resting(cls, rows: Spans, parts: dict[str, Tensor]) -> Block:
        """Contiguous tensors as they are; to be sent, such a block is `packed`."""
        buffer = next(iter(parts.values())).new_empty(0, dtype=torch.uint8)
        return cls(rows, buffer, parts)

    @classmethod
    def joined(cls, rows: Spans, blocks: Iterable[Block]) -> Block:
        """One block of all rows of disjoint blocks, together `rows`."""
        blocks = list(blocks)
        if len(blocks) == 1:
            return blocks[0]
        whole = cls.empty(rows, blocks[0].specs, blocks[0].buffer.device)
        for block in blocks:
            whole.take(block.rows, block.parts)
        return whole

    @property
    def specs(self) -> Specs:
        return {name: (tuple(part.shape[1:]), part.dtype) for name, part in self.parts.items()}

    def select(self, rows: Spans) -> Block:
        """The block of some of its rows: itself when that is all of them, else a copy."""
        if rows == self.rows:
            return self
        chosen = Block.empty(rows, self.specs, self.buffer.device)
        for name, part in chosen.parts.items():
            self.give(rows, name, part)
        return chosen

    def take(self, rows: Spans, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors (rows, ...) of any strides to where `rows` lie among this block's."""
        for start, end, first in _runs(self.rows, rows):
            for name, tensor in tensors.items():
                copy_(self[name][start:end], tensor[first : first + end - start])

    def give(self, rows: Spans, name: str, into: Tensor) -> None:
        """Copy some of this block's rows of one tensor into `into` (rows, ...) of any strides."""
        for start, end, first in _runs(self.rows, rows):
            copy_(into[first : first + end - start], self[name][start:end])

    @property
    def is_packed(self) -> bool:
        """Whether the parts lie in the buffer."""
        size = sum(part.numel() * part.element_size() for part in self.parts.values())
        return self.buffer.numel() == size

    def packed(self) -> Block:
        """The block with its parts in one buffer: itself unless it was `resting`."""
        return self if self.is_packed else Block.of(self.rows, self.parts)

    def apart(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Block]]:
        """Its tensors, and what makes it of them again, which holds none."""
        if self.is_packed:
            return [self.buffer], partial(_over, self.rows, self.specs)
        return list(self.parts.values()), partial(_resting, self.rows, tuple(self.parts))

    def cast(self, dtype: torch.dtype, *names: str) -> Block:
        """The block with these parts (all, unless named) in another dtype; itself if they are."""
        names = names or tuple(self.parts)
        if all(self[name].dtype == dtype for name in names):
            return self
        return Block.of(self.rows, self.parts, **dict.fromkeys(names, dtype))

    def add_(self, other: Block) -> None:
        """Add another block's rows, which are among these, in the dtypes of this one."""
        for start, end, first in _runs(self.rows, other.rows):
            for name, part in self.parts.items():
                part[start:end].add_(other[name][first : first + end - start])

    def among(self, rows: Spans) -> Block:
        """The part of this block that lies in `rows`."""
        return self.select(self.rows & rows)


def _over(rows: Spans, specs: Specs, tensors: Sequence[Tensor]) -> Block:
    return Block.over(rows, tensors[0], specs)


def _resting(rows: Spans, names: tuple[str, ...], tensors: Sequence[Tensor]) -> Block:
    return Block.resting(rows, dict(zip(names, tensors, strict=True)))


def copy_(into: Tensor, tensor: Tensor) -> None:
    """Copy, a GPU in elements of 8 bytes where the memory of both allows.

    A share of the heads, read in elements of 2 bytes, took twice its time (H100, 1.4 TB/s).
    """
    if into.is_cuda and into.dtype == tensor.dtype and _is_wide(into) and _is_wide(tensor):
        into, tensor = into.view(torch.int64), tensor.view(torch.int64)
    into.copy_(tensor)


def _is_wide(x: Tensor) -> bool:
    """Whether memory can be read in elements of 8 bytes."""
    unit = 8 // x.element_size()
    if unit <= 1 or not x.ndim or x.stride(-1) != 1:
        return False
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return all(step % unit == 0 for step in steps)


def _runs(rows: Spans, chosen: Spans) -> Iterable[tuple[int, int, int]]:
    """Where runs of `chosen` lie among `rows`: first and end row there, first row in `chosen`."""
    first = 0
    for start, end in rows.locate(chosen):
        yield start, end, first
        first += end - start


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
