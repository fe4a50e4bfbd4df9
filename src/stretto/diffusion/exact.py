"""An exact step shared by the step ranks: each evaluates rows of the batch, all get all of them.

A window of one step would leave every rank but one idle, or all of them with the same work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.denoise import Denoise, Passes, cut, mapped, tensors_of
from stretto.mesh.mesh import Mesh
from stretto.workload.denoise import chunks_of


def shared(call: Denoise, known: Any, mesh: Mesh, passes: Passes) -> Any:
    """The call's output, its batch cut over as many step ranks as divide it.

    `known` is an earlier output of the same form. Sends the output's bytes once from the ranks
    that work, nothing where no rank but one can. All ranks of the step axis make this call.
    """
    ranks, own = mesh.size("step"), mesh.rank("step")
    chunks = chunks_of(call.batch, ranks)
    if chunks == 1:
        return passes.make(call)
    mine = passes.make(call.chunk(own, chunks)) if own < chunks else None
    if chunks == ranks:
        return mapped(lambda tensor: _gathered(tensor, mesh), mine)
    template = cut(known, call.batch, slice(0, call.batch // chunks))
    parts = []
    for owner in range(chunks):
        piece = mine if own == owner else template
        parts.append(mapped(lambda tensor, o=owner: _spread(tensor, o, mesh), piece))
    return _joined(parts)


def _gathered(tensor: Tensor, mesh: Mesh) -> Tensor:
    return torch.cat(mesh.all_gather(tensor.contiguous(), "step", "exact").wait())


def _spread(tensor: Tensor, owner: int, mesh: Mesh) -> Tensor:
    return mesh.broadcast(tensor.contiguous().clone(), "step", owner, "exact").wait()


def _joined(parts: list) -> Any:
    """Outputs of equal form, joined along dim 0 tensor by tensor."""
    leaves = [iter(tensors_of(part)) for part in parts[1:]]
    return mapped(lambda first: torch.cat([first, *(next(rest) for rest in leaves)]), parts[0])
