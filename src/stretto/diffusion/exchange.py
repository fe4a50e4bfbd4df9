"""One message per window position: a fixed header and the raw bytes of a guided prediction."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.diffusion.deferred import Deferred, on_device, reading
from stretto.diffusion.denoise import tensors_of
from stretto.errors import NonFinite, RankLost, RanksDisagree
from stretto.mesh.mesh import Mesh
from stretto.plan.options import HEADER_BYTES

_MAGIC = b"STRETTO1"
_MAX_DIMS = 8
#: magic, window start and size, number of dims, dtype and device names, hash, dims; last the rank.
_LAYOUT = struct.Struct(f"<8sIII16s16s16s{_MAX_DIMS}QI")
#: In front of what a rank says that does not come to the first denoiser call.
_ABSENT = b"absent: "
#: Bytes that are alike in the headers of all ranks.
_ALIKE = _LAYOUT.size - 4


@dataclass(frozen=True)
class Header:
    """What a message says of itself. `digest` is 16 bytes of the window's first latents, or 0."""

    rank: int
    start: int
    size: int
    dtype: str
    device: str
    shape: tuple[int, ...]
    digest: bytes

    def packed(self) -> bytes:
        return _LAYOUT.pack(
            _MAGIC,
            self.start,
            self.size,
            len(self.shape),
            self.dtype.encode(),
            self.device.encode(),
            self.digest,
            *self.shape,
            *[0] * (_MAX_DIMS - len(self.shape)),
            self.rank,
        )

    @classmethod
    def unpacked(cls, head: bytes) -> Header:
        """A header at the start of `head`. Raises RanksDisagree for bytes that are none."""
        magic, start, size, ndim, dtype, device, digest, *dims, rank = _LAYOUT.unpack_from(head)
        if magic != _MAGIC:
            raise RanksDisagree(f"a window message starts with {magic!r}, not {_MAGIC!r}")
        return cls(
            rank=rank,
            start=start,
            size=size,
            dtype=dtype.rstrip(b"\0").decode(),
            device=device.rstrip(b"\0").decode(),
            shape=tuple(dims[:ndim]),
            digest=digest,
        )


def gather(
    mesh: Mesh, guided: Tensor | None, like: Tensor, header: Header, deferred: Deferred
) -> list[Tensor]:
    """Guided predictions of all positions of a window, in order.

    `guided` is this rank's own, None where the window has no position for it; `like` has the
    shape and dtype of all. Sends Steps.wire(case) bytes. Raises NonFinite and RanksDisagree, on a
    GPU when the next window has closed.
    """
    own = mesh.rank("step")
    message = _packed(like if guided is None else guided, header)
    if header.size == mesh.size("step"):
        parts = mesh.all_gather(message, "step", "window").wait()
    else:
        under_way = [
            mesh.broadcast(message if owner == own else message.clone(), "step", owner, "window")
            for owner in range(header.size)
        ]
        parts = [pending.wait() for pending in under_way]
    # Looked at after the exchange, so that all ranks raise and none waits for one that did.
    with deferred.aside(*parts):
        heads = torch.stack([part[:HEADER_BYTES] for part in parts])
        deferred.check(heads, lambda read: _check_heads(read, like.dtype, header, own))
    return [_unpacked(part, like) for part in parts]


def opening(mesh: Mesh, *arguments: Any) -> Callable[[], None]:
    """A check of the tensors of a first denoiser call: ranks must not blend two pictures.

    They are read now; the check compares them with the other ranks' and raises RanksDisagree, or
    RankLost for a rank that was `absent`. It may be made while the call is evaluated: before it a
    GPU would stand idle for 1 ms. Takes the mesh without its counter: what control costs is no part
    of a plan's bytes.
    """
    if mesh.world_size == 1:
        return lambda: None
    read = reading(tensors_of(arguments))

    def check() -> None:
        own = digest(*read())
        for rank, seen in enumerate(mesh.gather_bytes(own)):
            if seen.startswith(_ABSENT):
                reason = seen.removeprefix(_ABSENT).decode(errors="replace")
                raise RankLost(f"first denoiser call: rank {rank} ended before it, {reason}")
            if seen != own:
                raise RanksDisagree(
                    f"first denoiser call: rank {rank} has inputs {seen.hex()[:8]}, rank "
                    f"{mesh.world_rank} {own.hex()[:8]} (hash of latents, embeddings and all "
                    "timesteps); pass the same prompt, seed, sizes and scheduler on every rank"
                )

    return check


def absent(mesh: Mesh, reason: str) -> bool:
    """In place of an `opening`: tell the ranks that wait in theirs; whether all were absent too."""
    said = mesh.gather_bytes(_ABSENT + reason.encode())
    return all(seen.startswith(_ABSENT) for seen in said)


def check_finite(prediction: Tensor, step: int, deferred: Deferred, *, rank: int) -> None:
    """Raise NonFinite for a prediction of step rank `rank` that would poison the latents."""
    with deferred.aside(prediction):
        largest = _largest(prediction)
        deferred.check(largest, lambda read: _check_finite(read.view(1).tolist()[0], step, rank))


def _largest(prediction: Tensor) -> Tensor:
    """Its largest magnitude, NaN or infinite where any is: found in one pass, in one number."""
    # Its dtype is named, as autocast on a GPU would answer in float32, which the header has no
    # room for.
    return torch.linalg.vector_norm(prediction.detach(), math.inf, dtype=prediction.dtype)


def _check_finite(largest: float, step: int, rank: int) -> None:
    if not math.isfinite(largest):
        raise NonFinite(
            f"step rank {rank}: the prediction of step {step} holds NaN or infinity; use a "
            "smaller guidance scale, or bfloat16 or float32 where it is float16; of UniPC also "
            "timesteps or sigmas that do not fall"
        )


def digest(*tensors: Tensor) -> bytes:
    """16 bytes that differ when any bit of the tensors differs."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        state.update(_raw(tensor).cpu().numpy().tobytes())
    return state.digest()


def _packed(guided: Tensor, header: Header) -> Tensor:
    # The header ends with the largest magnitude: each rank looks at its own prediction alone.
    head = header.packed().ljust(HEADER_BYTES - guided.element_size(), b"\0")
    own = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    largest = _largest(guided).view(1).view(torch.uint8)
    return torch.cat([on_device(own, guided.device), largest, _raw(guided)])


def _check_heads(read: Tensor, dtype: torch.dtype, own: Header, rank: int) -> None:
    """Headers of a window on the host: all agree with this rank's, no prediction has a hole."""
    heads = read.numpy()
    if (heads[:, :_ALIKE] != np.frombuffer(own.packed()[:_ALIKE], np.uint8)).any():
        _check([Header.unpacked(head.tobytes()) for head in heads], own, rank)
    largest = read[:, -dtype.itemsize :].contiguous().view(dtype).flatten().tolist()
    for position, value in enumerate(largest):
        _check_finite(value, own.start + position, position)


def _unpacked(message: Tensor, like: Tensor) -> Tensor:
    """The prediction in a message, in the layout of `like`: a convolution sees channels last."""
    # The header's length is a multiple of every element size, so the view is aligned.
    found = message[HEADER_BYTES:].view(like.dtype).view(like.shape)
    return found if like.is_contiguous() else torch.empty_like(like).copy_(found)


def _raw(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    # One expanded element passes for contiguous, but its stride is not 1.
    flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _check(headers: list[Header], own: Header, rank: int) -> None:
    """All ranks must be in the same window, on the same kind of device, with equal latents."""
    for seen in headers:
        pairs = {
            "window start": (seen.start, own.start),
            "window size": (seen.size, own.size),
            "dtype": (seen.dtype, own.dtype),
            "shape": (seen.shape, own.shape),
            "device kind": (seen.device, own.device),
            "window-start latents": (seen.digest.hex(), own.digest.hex()),
        }
        for what, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise RanksDisagree(
                    f"{what}: rank {seen.rank} has {theirs}, rank {rank} has {ours}; all ranks "
                    "must make the same call with the same versions on the same kind of device"
                )
