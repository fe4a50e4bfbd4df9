"""Triton kernels of attention's row-wise steps: merge, delta, surrogate, each in one pass.

    rows are (row, batch, head) in storage order, L * B * H of them   D head dim

Every tensor is contiguous and statistics are float32; `merge.py` and `backends.py` say what is
computed and hold the same in torch. Imported on first use: where CUDA is absent, so may triton be.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Elements of one program: 16 for each thread of 4 warps, so that loads are 16 bytes wide.
TILE = 2048


def merge_(acc: Tensor, acc_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`merge.merge_` for float32 accumulators."""
    _launch(_merge, acc, acc_lse, part, part_lse)


def delta(dout: Tensor, out: Tensor, into: Tensor) -> None:
    """`backends.delta` into a float32 tensor."""
    _launch(_delta, dout, out, into)


def surrogate(dout: Tensor, delta: Tensor, into: Tensor) -> None:
    """`backends.surrogate` into a tensor of dout's dtype; delta is float32."""
    _launch(_surrogate, dout, delta, into)


def _launch(kernel, x: Tensor, *others: Tensor) -> None:
    """Run a kernel over all rows of x, whose last dim is the head dim."""
    assert all(tensor.is_contiguous() for tensor in (x, *others))
    width = x.shape[-1]
    rows, columns = x.numel() // width, triton.next_power_of_2(width)
    block = max(1, TILE // columns)
    kernel[(triton.cdiv(rows, block),)](x, *others, rows, D=width, COLUMNS=columns, ROWS=block)


@triton.jit
def _places(rows, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows, which of them exist, element offsets and which of those exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    at = row[:, None] * D + column[None, :]
    return row, here, at, here[:, None] & (column < D)[None, :]


@triton.jit
def _merge(
    acc,
    acc_lse,
    part,
    part_lse,
    rows,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, here, at, inside = _places(rows, D, COLUMNS, ROWS)
    nothing = float("-inf")
    old = tl.load(acc_lse + row, here, other=nothing)
    new = tl.load(part_lse + row, here, other=nothing)
    peak = tl.maximum(old, new)
    peak = tl.where(peak == nothing, 0.0, peak)
    old_weight, new_weight = tl.exp(old - peak), tl.exp(new - peak)
    total = old_weight + new_weight
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    # An absent side is not read: its memory may never have been written.
    a = tl.load(acc + at, inside & (old != nothing)[:, None], other=0.0)
    b = tl.load(part + at, inside & (new != nothing)[:, None], other=0.0).to(tl.float32)
    merged = a * (old_weight * share)[:, None] + b * (new_weight * share)[:, None]
    # All warps read acc_lse, one writes it: without the barrier it may before the others have read.
    tl.debug_barrier()
    tl.store(acc_lse + row, tl.where(total == 0.0, nothing, peak + tl.log(total)), here)
    tl.store(acc + at, merged, inside)


@triton.jit
def _delta(dout, out, into, rows, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, here, at, inside = _places(rows, D, COLUMNS, ROWS)
    a = tl.load(dout + at, inside, other=0.0).to(tl.float32)
    b = tl.load(out + at, inside, other=0.0).to(tl.float32)
    tl.store(into + row, tl.sum(a * b, axis=1), here)


@triton.jit
def _surrogate(dout, delta, into, rows, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, here, at, inside = _places(rows, D, COLUMNS, ROWS)
    x = tl.load(dout + at, inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x), axis=1)
    peak = tl.where(peak == 0.0, 1.0, peak)
    unit = x / peak[:, None]
    length = tl.sum(unit * unit, axis=1)
    length = tl.where(length == 0.0, 1.0, length)
    factor = tl.load(delta + row, here, other=0.0) / peak / length
    tl.store(into + at, (unit * factor[:, None]).to(into.dtype.element_ty), inside)
