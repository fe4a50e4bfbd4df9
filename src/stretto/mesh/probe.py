"""What this machine really does: matmul and copy rates per rank, and messages between ranks.

`measure` runs on every rank of a mesh, all ranks at once, because that is how they will work.
`probe` starts those ranks on this machine. What the samples mean is for `cost.fit` to say.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from stretto.errors import ConfigError, LaunchError, RankLost
from stretto.mesh.mesh import Mesh, init_mesh

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


def probe(ranks: int, *, timeout_s: float = 120.0) -> Measured:
    """Start `ranks` ranks on this machine, measure, and return rank 0's view of all of them.

    GPUs where there are any, one per rank over NCCL if there are enough of them; else one CPU
    thread per rank over gloo. Raises LaunchError with a rank's traceback, RankLost on timeout.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "stretto.mesh.probe"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            job = (rank, ranks, folder, timeout_s, sender)
            processes.append(context.Process(target=_rank, args=job, daemon=True))
            processes[-1].start()
            sender.close()
            pipes.append(receiver)
        try:
            return _results(pipes, timeout_s)[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank: int, ranks: int, folder: str, timeout_s: float, sender) -> None:
    """One rank: join, measure, report; it stays until it is ended, so that no peer misses it."""
    torch.set_num_threads(1)
    try:
        enough = torch.cuda.is_available() and ranks <= torch.cuda.device_count()
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if enough else "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        os.environ["LOCAL_RANK"] = str(rank)  # in this child only: which GPU is ours
        mesh = init_mesh(_Line({"step": ranks}), timeout_s=timeout_s)
        backend = "nccl" if enough else "gloo"
        sender.send(("result", measure(mesh, backend=backend)))
    except BaseException as error:  # noqa: BLE001 - everything crosses to the parent
        sender.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    time.sleep(timeout_s)


@dataclass(frozen=True)
class _Line:
    """A plan that is nothing but axis sizes."""

    sizes: Mapping[str, int]


def _results(pipes: list[Connection], timeout_s: float) -> list[Measured]:
    """One result per rank, or the first failure."""
    results: dict[int, Measured] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        left = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankLost(f"probe: ranks {sorted(left.values())} gave nothing in {timeout_s:g} s")
        for pipe, rank in left.items():
            if pipe in ready:
                results[rank] = _received(pipe, rank)
    return [results[rank] for rank in range(len(pipes))]


def _received(pipe: Connection, rank: int) -> Measured:
    try:
        kind, content = pipe.recv()
    except EOFError:
        raise RankLost(f"probe: rank {rank} ended without a result") from None
    if kind == "error":
        raise LaunchError(f"probe: rank {rank} raised {content}")
    return content


def measure(
    mesh: Mesh,
    *,
    backend: str = "gloo",
    dtypes: tuple[str, ...] = (),
    sides: tuple[int, ...] = MATRIX_SIDES,
    message_bytes: tuple[int, ...] = MESSAGE_BYTES,
) -> Measured:
    """Samples of one mesh along its step axis; every rank calls it and gets the same figures.

    `dtypes` empty takes those of the device: fp64, fp32, bf16, and fp16 where it is a GPU.
    """
    names = dtypes or tuple(DTYPES)[: 4 if mesh.device.type == "cuda" else 3]
    products = tuple(Product(name, n, _product(mesh, name, n)) for name in names for n in sides)
    copy = _copy(mesh)
    messages: list[Message] = []
    if mesh.size("step") > 1:
        for num_bytes in message_bytes:
            messages += _messages(mesh, num_bytes)
    return Measured(mesh.size("step"), mesh.device.type, backend, copy, products, tuple(messages))


def _product(mesh: Mesh, dtype: str, side: int) -> float:
    a = torch.ones(side, side, dtype=DTYPES[dtype], device=mesh.device)
    out = torch.zeros_like(a)
    return _repeat(mesh, lambda: torch.mm(a, a, out=out))


def _copy(mesh: Mesh) -> float:
    source = torch.zeros(COPY_BYTES // mesh.size("step"), dtype=torch.uint8, device=mesh.device)
    target = torch.ones_like(source)
    return 2 * source.numel() / _repeat(mesh, lambda: target.copy_(source))


def _messages(mesh: Mesh, num_bytes: int) -> list[Message]:
    """A message of this size by each verb; point to point is half a round trip of ranks 0 and 1."""
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=mesh.device)
    size, rank = mesh.size("step"), mesh.rank("step")

    def round_trip() -> None:
        for move in ({0: 1}, {1: 0}):
            if rank < 2:
                mesh.permute(tensor, "step", move, "probe").wait()

    gather = _repeat(mesh, lambda: mesh.all_gather(tensor, "step", "probe").wait())
    spread = _repeat(mesh, lambda: mesh.broadcast(tensor, "step", 0, "probe").wait())
    there = _repeat(mesh, round_trip) / 2
    return [
        Message("all_gather", num_bytes, size, gather),
        Message("broadcast", num_bytes, size, spread),
        Message("permute", num_bytes, 2, there),
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
