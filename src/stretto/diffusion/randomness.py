"""The random generators a pipeline call draws from: saved, restored, watched, made equal."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.inputs import refuse_unlike
from stretto.mesh.mesh import Mesh


class Randomness:
    """Generators handed to the call, and the default ones unless `own_only`.

    Virtual ranks share the default generators, so they use `own_only`.
    """

    def __init__(self, generators: Sequence[torch.Generator] = (), *, own_only: bool = False):
        self._generators = list(generators)
        self._own_only = own_only
        self._mark: list[Any] | None = None

    def snapshot(self) -> list[Tensor]:
        """States of all generators; a few kilobytes."""
        return [generator.get_state() for generator in self._all()]

    def restore(self, states: Sequence[Tensor]) -> None:
        # A GPU may have come into use since: what it drew from was not watched then.
        for generator, state in zip(self._all(), states, strict=False):
            generator.set_state(state.cpu())

    def mark(self) -> None:
        """Remember where the generators are, at the end of a step."""
        self._mark = [_place(generator) for generator in self._all()]

    def moved(self) -> bool:
        """Whether anything was drawn since `mark`."""
        return self._mark is not None and self._mark != [_place(g) for g in self._all()]

    def _all(self) -> list[torch.Generator]:
        if self._own_only:
            return self._generators
        default = [torch.default_generator]
        if torch.cuda.is_initialized():
            default.append(torch.cuda.default_generators[torch.cuda.current_device()])
        return self._generators + default

    def adopt(self, mesh: Mesh) -> None:
        """Take over rank 0's states, so that all ranks draw the same. Raises RanksDisagree."""
        if mesh.world_size == 1:
            return
        kinds = ",".join(g.device.type for g in self._generators) or "default"
        refuse_unlike(
            mesh,
            {"generators": kinds},
            why="all ranks take over the states of rank 0's",
            to_fix="pass generators of one kind on every rank",
        )
        own = _packed(self.snapshot())
        first = mesh.broadcast_bytes(own)
        if first != own:
            self.restore(_unpacked(first))


def _place(generator: torch.Generator) -> Any:
    """Something that changes with every draw; asked for twice a step, so it should cost little."""
    if generator.device.type == "cuda":
        return generator.initial_seed(), generator.get_offset()
    return generator.get_state().numpy().tobytes()


def _packed(states: Sequence[Tensor]) -> bytes:
    """States one after another, their number and lengths in front."""
    head = struct.pack(f"<{1 + len(states)}I", len(states), *map(len, states))
    return head + b"".join(state.numpy().tobytes() for state in states)


def _unpacked(data: bytes) -> list[Tensor]:
    (count,) = struct.unpack_from("<I", data)
    lengths = struct.unpack_from(f"<{count}I", data, 4)
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # Copies: a generator reads a state from where its storage begins.
    return [part.clone() for part in whole[4 * (1 + count) :].split(lengths)]
