"""A mesh that counts: every byte sent is recorded, to be held against what a plan declared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from stretto.mesh.mesh import Mesh, Pending
from stretto.plan.traffic import Traffic


class CountingMesh(Mesh):
    """Wraps any mesh; `traffic` holds bytes sent by this rank, `calls` collectives per verb.

    Messages of the phase `control` (flags, hashes, lengths) belong to no plan and are left out.
    """

    def __init__(self, mesh: Mesh):
        super().__init__(mesh.sizes, mesh.world_rank, mesh.device, mesh.timeout_s)
        self.mesh = mesh
        self.traffic = Traffic()
        self.calls: Counter[str] = Counter()

    def all_gather(self, tensor, axis, phase):
        self._count(phase, "all_gather", axis, (self.size(axis) - 1) * _size(tensor))
        return self.mesh.all_gather(tensor, axis, phase)

    def all_reduce(self, tensor, axis, phase):
        ranks = self.size(axis)
        self._count(phase, "all_reduce", axis, 2 * (ranks - 1) * _size(tensor) // ranks)
        return self.mesh.all_reduce(tensor, axis, phase)

    def broadcast(self, tensor, axis, src, phase):
        copies = self.size(axis) - 1 if self.rank(axis) == src else 0
        self._count(phase, "broadcast", axis, copies * _size(tensor))
        return self.mesh.broadcast(tensor, axis, src, phase)

    def permute(
        self, tensor, axis, moves: Mapping[int, int], phase
    ) -> Pending[torch.Tensor | None]:
        copies = int(self.rank(axis) in moves)
        self._count(phase, "permute", axis, copies * _size(tensor))
        return self.mesh.permute(tensor, axis, moves, phase)

    def exchange(self, sends, receives, axis, phase, *, verb="exchange", channel=0):
        here = self.rank(axis)
        sent = sum(_size(tensor) for position, tensor in sends.items() if position != here)
        self._count(phase, verb, axis, sent)
        return self.mesh.exchange(sends, receives, axis, phase, verb=verb, channel=channel)

    def abort(self, reason):
        self.mesh.abort(reason)

    def allow(self, timeout_s):
        self.mesh.allow(timeout_s)
        super().allow(timeout_s)

    def check(self):
        self.mesh.check()

    def close(self):
        self.mesh.close()

    def record(self, stage, *, waiting=False):
        self.mesh.record(stage, waiting=waiting)

    def _count(self, phase: str, verb: str, axis: str | None, num_bytes: int) -> None:
        if self.size(axis) > 1 and phase != "control":
            self.calls[verb] += 1
            self.traffic.add(phase, verb, axis or "world", num_bytes)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
