"""Tensors cut to the rows that a layout gives each rank, and put together again.

The functions on `Spans` know nothing of ranks; the others read the logical index `mesh.rank("cp")`,
so results do not depend on where ranks are placed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stretto.errors import ShapeError
from stretto.mesh.mesh import Mesh
from stretto.plan import ranges
from stretto.plan.ranges import FULL, Layout, Mask, Spans

#: The mesh axis that sequences are split along.
AXIS = "cp"


def take(x: Tensor, dim: int, rows: Spans) -> Tensor:
    """The given rows of a whole tensor along `dim`, in ascending order, as a copy.

    Differentiable. Raises ShapeError for rows past the end.
    """
    if rows.hull[1] > x.shape[dim]:
        raise ShapeError(
            f"rows up to {rows.hull[1] - 1} asked of a tensor with {x.shape[dim]} along dim {dim}"
        )
    parts = [x.narrow(dim, start, end - start) for start, end in rows]
    return torch.cat(parts or [x.narrow(dim, 0, 0)], dim)


def join(parts: Sequence[Tensor], dim: int, shards: Sequence[Spans]) -> Tensor:
    """The whole tensor from every rank's rows, the inverse of `take` over all shards.

    Differentiable. Raises ShapeError for a part with other rows than its shard.
    """
    pieces: list[tuple[int, Tensor]] = []
    for rank, (part, rows) in enumerate(zip(parts, shards, strict=True)):
        _check_rows(part, dim, rows, rank)
        lengths = [end - start for start, end in rows]
        chunks = part.split(lengths, dim) if lengths else ()
        pieces += zip((start for start, _ in rows), chunks, strict=True)
    pieces.sort(key=lambda piece: piece[0])
    return torch.cat([chunk for _, chunk in pieces] or [parts[0]], dim)


def row_positions(rows: Spans, device: torch.device | str = "cpu") -> Tensor:
    """Global positions of rows, ascending: int64 (rows,)."""
    parts = [torch.arange(start, end, device=device) for start, end in rows]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def shard(
    x: Tensor, dim: int, mesh: Mesh | None, *, layout: Layout = "auto", mask: Mask = FULL
) -> Tensor:
    """This rank's rows of `x`, which is whole on every rank, along `dim`.

    `layout` and `mask` are those of the attention that follows (`context.layout`); "auto" and
    "documents" depend on the mask. Copies, sends nothing, differentiable. `mesh` None is one rank.
    Raises ShapeError for documents that do not fit, PlanMismatch for a layout that does not.
    """
    shards = ranges.shard(layout, x.shape[dim], _parts(mesh), mask)
    return take(x, dim, shards[_rank(mesh)])


def unshard(
    x: Tensor,
    dim: int,
    mesh: Mesh | None,
    tokens: int,
    *,
    layout: Layout = "auto",
    mask: Mask = FULL,
) -> Tensor:
    """The whole tensor, `tokens` rows along `dim`, on every rank: the inverse of `shard`.

    Each rank sends its rows to every other one, phase "unshard". Not differentiable.
    Raises ShapeError where the rows are not those of the layout; MeshTimeout, RankLost.
    """
    shards = ranges.shard(layout, tokens, _parts(mesh), mask)
    own = x.detach().contiguous()
    if mesh is None or len(shards) == 1:
        _check_rows(own, dim, shards[0], 0)
        return own.clone()
    with mesh.ending_peers("unshard"):
        return join(_gathered(own, dim, mesh, shards), dim, shards)


def _gathered(own: Tensor, dim: int, mesh: Mesh, shards: Sequence[Spans]) -> list[Tensor]:
    """Every rank's rows, by logical index."""
    rank = mesh.rank(AXIS)
    _check_rows(own, dim, shards[rank], rank)
    receives = {
        peer: own.new_empty(_with_rows(own, dim, rows.rows))
        for peer, rows in enumerate(shards)
        if peer != rank
    }
    got = mesh.exchange(dict.fromkeys(receives, own), receives, AXIS, "unshard").wait()
    return [own if peer == rank else got[peer] for peer in range(len(shards))]


def positions(
    tokens: int, mesh: Mesh | None, *, layout: Layout = "auto", mask: Mask = FULL
) -> Tensor:
    """Global positions of this rank's rows of a sequence, ascending: int64, on the mesh's device.

    With packed documents these count through all documents; position ids that start again in each
    are cut like any other tensor, with `shard`.
    """
    own = ranges.shard(layout, tokens, _parts(mesh), mask)[_rank(mesh)]
    return row_positions(own, "cpu" if mesh is None else mesh.device)


def _parts(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size(AXIS)


def _rank(mesh: Mesh | None) -> int:
    return 0 if mesh is None else mesh.rank(AXIS)


def _with_rows(x: Tensor, dim: int, rows: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = rows
    return shape


def _check_rows(x: Tensor, dim: int, rows: Spans, rank: int) -> None:
    if x.shape[dim] != rows.rows:
        raise ShapeError(
            f"cp rank {rank} holds {x.shape[dim]} rows along dim {dim}, its layout gives it "
            f"{rows.rows}; cut the whole tensor with shard() and the same layout and mask"
        )
