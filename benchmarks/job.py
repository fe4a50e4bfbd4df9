"""What scripts with real ranks share: the clock, the terminal, and what all ranks agree on.

No script. Ranks are started by torchrun (or a parent that sets the same environment); the number
of ranks comes from there, each takes the GPU of its local rank, with `dry` the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import result
import torch

from stretto.mesh.mesh import Mesh

#: What ranks of one host get where it is unset. NVLink multicast stays off: where it fails, it
#: takes the GPUs with it. Gloo talks over the loopback: a host without a network may have no
#: address for its own name.
ONE_HOST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Axes:
    """A plan that is nothing but axis sizes."""

    sizes: Mapping[str, int]


class Rank:
    """One rank's view of the job. `world`: a mesh of all ranks, whose host messages are gloo's.

    `options`: `started` (seconds since the epoch) and `budget_s`.
    """

    def __init__(self, options: argparse.Namespace, world: Mesh):
        self.options = options
        self.world = world
        self.rank, self.ranks = world.world_rank, world.world_size
        self.device = world.device

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.time() - self.options.started:6.1f} s] {text}", flush=True)

    def barrier(self) -> None:
        result.synchronise(self.device)
        self.world.barrier()

    def collect(self, mine: Any) -> list[Any]:
        """A plain value of every rank, on all ranks."""
        parts = self.world.gather_bytes(json.dumps(mine).encode())
        return [json.loads(part) for part in parts]

    def left_s(self) -> float:
        """Seconds of the budget that are left, by this rank's clock."""
        return self.options.started + self.options.budget_s - time.time()

    def may_run(self, who: str, expected_s: float) -> bool:
        """Rank 0 decides whether something still fits the budget."""
        left = self.left_s()
        told = self.world.broadcast_bytes(b"1" if expected_s < left else b"0")
        if told == b"0":
            self.say(f"no time left for {who}: {expected_s:.0f} s needed, {left:.0f} s left")
        return told == b"1"

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Rank 0 works alone, the others sleep in a barrier; its plain result on all ranks."""
        self.barrier()
        mine = work() if self.rank == 0 else None
        self.barrier()
        return self.collect(mine)[0]


class Stamps:
    """Moments of a device between pieces of work; on the CPU, of the host."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._made: list[Any] = []

    def stamp(self) -> None:
        if not self._cuda:
            self._made.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._made.append(event)

    def milliseconds(self) -> list[float]:
        """Between each two moments; waits for the device."""
        pairs = zip(self._made[:-1], self._made[1:], strict=True)
        if not self._cuda:
            return [1e3 * (b - a) for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def slowest(every: Sequence[Sequence[float]]) -> list[float]:
    """Of each repeat the rank that took longest."""
    return [max(values) for values in zip(*every, strict=True)]


def local_device(dry: bool) -> torch.device:
    """The GPU of this rank's own. Ends the script where there are more ranks than GPUs."""
    if dry:
        return torch.device("cpu")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise SystemExit(
            f"rank {local} has no GPU of its own, there are {count}: --nproc-per-node {count}"
        )
    for name, value in ONE_HOST.items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def device_words(device: torch.device, ranks: int) -> str:
    """What a result calls the machine."""
    if device.type == "cpu":
        return f"{ranks} gloo ranks of one thread on a CPU (dry)"
    return f"{ranks} x {torch.cuda.get_device_name(device)}, one host, NCCL {nccl_version()}"


def nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def parser(text: str, *, budget_s: float) -> argparse.ArgumentParser:
    """Options that all of these scripts have."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, help="JSON file to write")
    made.add_argument(
        "--budget-s", type=float, default=budget_s, help="nothing starts that ends later"
    )
    made.add_argument("--commit", default="unknown", help="recorded in the result")
    made.add_argument("--dry", action="store_true", help="small sizes on the CPU, over gloo")
    return made


def started(options: argparse.Namespace) -> argparse.Namespace:
    """Note when the script began; the command without torchrun's own words is in `sys.argv`."""
    options.started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
    if "RANK" not in os.environ:
        sys.exit(f"start it with torchrun --standalone --nproc-per-node N {sys.argv[0]}")
    return options


def command(ranks: int) -> str:
    """The command line that a result names."""
    return shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(ranks), *sys.argv])


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
