"""What this machine really does: matmul and copy rates per rank, and messages between ranks.

`measure` runs on every rank of a mesh, all ranks at once, because that is how they will work.
`probe` starts those ranks on this machine. What the samples mean is for `cost.fit` to say.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stretto.errors import ConfigError
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import Tell, launch
from stretto.mesh.mesh import Mesh

#: Message sizes, bytes: 1 KiB to 16 MiB.
MESSAGE_BYTES = tuple(1024 * 4**power for power in range(8))
#: Sides of the square matrices that are multiplied.
MATRIX_SIDES = (256, 512, 1024)
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
#: A load average above this share of the cores means somebody else is being measured too.
LOAD_LIMIT = 0.5
#: Copied back and forth: larger than the last-level cache of common processors.
COPY_BYTES = 256 * 2**20

_LEAST_REPEATS, _MOST_REPEATS, _BUDGET_S = 3, 15, 0.15


@dataclass(frozen=True)
class Message:
    """One measured collective: `seconds` until the last of `ranks` ranks had its result."""

    verb: str
    num_bytes: int
    ranks: int
    seconds: float


@dataclass(frozen=True)
class Product:
    """One measured matrix product of two `side` x `side` matrices, the slowest rank's median."""

    dtype: str
    side: int
    seconds: float

    @property
    def flop_rate(self) -> float:
        return 2 * self.side**3 / self.seconds


@dataclass(frozen=True)
class Measured:
    """All samples of a probe. `memory_rate`: bytes read and written per second by a copy."""

    ranks: int
    device: str
    backend: str
    memory_rate: float
    products: tuple[Product, ...]
    messages: tuple[Message, ...]


def refuse_load(load: float, cores: int) -> None:
    """Raise ConfigError when the one-minute load says that others are at work."""
    if load > LOAD_LIMIT * cores:
        raise ConfigError(
            f"load average {load:.2f} on {cores} core(s), more than {LOAD_LIMIT:g} per core\n"
            "  why: a probe on a busy machine measures the others' work\n"
            "  to fix: wait until it is idle, or --force and do not trust the figures"
        )


def probe(ranks: int, *, timeout_s: float = 60.0) -> Measured:
    """Start `ranks` ranks on this machine, measure, and return what all of them saw.

    GPUs where there are any, one per rank over NCCL if there are enough of them; else one CPU
    thread per rank over gloo. Raises what `launch` raises.
    """
    return launch(_rank, ranks, timeout_s, ranks=ranks, timeout_s=timeout_s)[0]


def _rank(tell: Tell, ranks: int, timeout_s: float) -> Measured:
    mesh = init_mesh(_Line({"step": ranks}), timeout_s=timeout_s)
    return measure(mesh, tell=tell)


@dataclass(frozen=True)
class _Line:
    """A plan that is nothing but axis sizes."""

    sizes: Mapping[str, int]


def measure(
    mesh: Mesh,
    *,
    tell: Tell = lambda stage: None,
    dtypes: tuple[str, ...] = (),
    sides: tuple[int, ...] = MATRIX_SIDES,
    message_bytes: tuple[int, ...] = MESSAGE_BYTES,
) -> Measured:
    """Samples of one mesh along its step axis; every rank calls it and gets the same figures.

    `dtypes` empty takes those of the device: fp64, fp32, bf16, and fp16 where it is a GPU.
    `tell` hears what is being measured.
    """
    products: list[Product] = []
    for name in dtypes or tuple(DTYPES)[: 4 if mesh.device.type == "cuda" else 3]:
        tell(f"matmul {name}")
        products += [Product(name, side, _product(mesh, name, side)) for side in sides]
    tell("memory copy")
    copy = _copy(mesh)
    messages: list[Message] = []
    for num_bytes in message_bytes if mesh.size("step") > 1 else ():
        tell(f"messages of {num_bytes} bytes")
        messages += _messages(mesh, num_bytes)
    carrier = _carrier(mesh) if messages else "none"
    size = mesh.size("step")
    return Measured(size, mesh.device.type, carrier, copy, tuple(products), tuple(messages))


def _carrier(mesh: Mesh) -> str:
    """Which back end moves this mesh's tensors."""
    if not dist.is_initialized():
        return "threads"
    # As torch writes it: "gloo", or one back end per kind of device.
    by_kind = dict(part.split(":") for part in dist.get_backend_config().split(",") if ":" in part)
    return by_kind.get(mesh.device.type, dist.get_backend())


def _product(mesh: Mesh, dtype: str, side: int) -> float:
    a = torch.ones(side, side, dtype=DTYPES[dtype], device=mesh.device)
    out = torch.zeros_like(a)
    return _repeat(mesh, lambda: torch.mm(a, a, out=out))


def _copy(mesh: Mesh) -> float:
    source = torch.zeros(COPY_BYTES // mesh.size("step"), dtype=torch.uint8, device=mesh.device)
    target = torch.ones_like(source)
    return 2 * source.numel() / _repeat(mesh, lambda: target.copy_(source))


def _messages(mesh: Mesh, num_bytes: int) -> list[Message]:
    """A message of this size by each verb; point to point is half a round trip of ranks 0 and 1.

    A shift and an all-to-all are what attention does: every rank sends at once, to the next one or
    a message to each.
    """
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=mesh.device)
    size, rank = mesh.size("step"), mesh.rank("step")

    def round_trip() -> None:
        for move in ({0: 1}, {1: 0}):
            if rank < 2:
                mesh.permute(tensor, "step", move, "probe").wait()

    def every_rank(distances: range) -> None:
        sends = {(rank - distance) % size: tensor for distance in distances}
        receives = {(rank + distance) % size: into[distance - 1] for distance in distances}
        mesh.exchange(sends, receives, "step", "probe").wait()

    into = [torch.empty_like(tensor) for _ in range(size - 1)]
    gather = _repeat(mesh, lambda: mesh.all_gather(tensor, "step", "probe").wait())
    spread = _repeat(mesh, lambda: mesh.broadcast(tensor, "step", 0, "probe").wait())
    there = _repeat(mesh, round_trip) / 2
    shift = _repeat(mesh, lambda: every_rank(range(1, 2)))
    all_to_all = _repeat(mesh, lambda: every_rank(range(1, size)))
    return [
        Message("all_gather", num_bytes, size, gather),
        Message("broadcast", num_bytes, size, spread),
        Message("permute", num_bytes, 2, there),
        Message("shift", num_bytes, size, shift),
        Message("all_to_all", num_bytes, size, all_to_all),
    ]


def _repeat(mesh: Mesh, work: Callable[[], object]) -> float:
    """Median over repeats of the slowest rank's seconds; the number of repeats is rank 0's."""
    work()
    first = _timed(mesh, work)
    wanted = min(_MOST_REPEATS, max(_LEAST_REPEATS, int(_BUDGET_S / max(first, 1e-6))))
    repeats = int(mesh.broadcast_bytes(str(wanted).encode(), "step"))
    own = [_timed(mesh, work) for _ in range(repeats)]
    every = [json.loads(part) for part in mesh.gather_bytes(json.dumps(own).encode(), "step")]
    return statistics.median(map(max, zip(*every, strict=True)))


def _timed(mesh: Mesh, work: Callable[[], object]) -> float:
    """Seconds of one piece of work that all ranks begin together."""
    mesh.barrier("step")
    begun = time.perf_counter()
    work()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    return time.perf_counter() - begun
