"""Real ranks for tests: processes forked from a warm server, over gloo and a file store.

A 4-rank test costs about a second because the server has imported torch once. Source of the
method: the standard library's forkserver start method with a preload list.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

from stretto.errors import LaunchError, RankLost

#: Seconds that the cause of a peer's loss may take to be told after the loss.
CAUSE_S = 5.0
#: Imported once by the server, so that ranks start in a tenth of a second.
PRELOAD = ("torch", "torch.distributed", "torch.optim", "torch._dynamo", "stretto.mesh.join")


@dataclass(frozen=True)
class Axes:
    """A plan that is nothing but axis sizes."""

    sizes: Mapping[str, int]


def run_ranks(
    body: Callable,
    sizes: Mapping[str, int],
    *args,
    timeout_s: float = 60,
    mesh_timeout_s: float | None = None,
) -> list:
    """Run module-level `body(mesh, *args)` on every rank of a mesh; results in rank order.

    Results are pickled. Raises LaunchError with the first failing rank's traceback, RankLost when
    a rank dies without a word or the ranks do not finish within `timeout_s` seconds (their stacks
    go to stderr). All ranks have ended when it returns. `mesh_timeout_s` is the deadline of a wait
    inside the ranks, by default the same.
    """
    count = 1
    for size in sizes.values():
        count *= size
    context = _server()
    limits = (timeout_s, mesh_timeout_s or timeout_s)
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            job = (body, dict(sizes), args, rank, count, folder, limits, sender, list(sys.path))
            process = context.Process(target=_rank, args=job, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            ranks.append(process)
        try:
            return _collect(pipes, ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def preloaded() -> list[str]:
    """Modules of the preload list that this process holds; a rank must hold them all."""
    return [name for name in PRELOAD if name in sys.modules]


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "stretto.testing.ranks"])
    # One thread per rank: more threads than cores spin against each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


def _rank(body, sizes, args, rank, count, folder, limits, sender, path) -> None:
    """One rank: join, run, report."""
    import torch
    import torch.distributed as dist

    from stretto.mesh.join import init_mesh

    sys.path[:] = path
    faulthandler.dump_traceback_later(limits[0] * 0.95, exit=False)
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), count)
        limit = timedelta(seconds=limits[0])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
        mesh = init_mesh(Axes(sizes), device="cpu", timeout_s=limits[1])
        # Plain pickle: multiprocessing's own would pass tensors as file descriptors of a rank that
        # ends before they are opened.
        sender.send_bytes(pickle.dumps(("result", body(mesh, *args))))
        _leave(store, rank, count)
    except BaseException as error:  # noqa: BLE001 - everything crosses to the parent
        content = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
        sender.send_bytes(pickle.dumps(content))
    sender.close()


def _leave(store, rank: int, count: int) -> None:
    """Stay until every rank is done: a closed connection would look like a death to the others."""
    store.add("done", 1)
    deadline = time.monotonic() + 30
    while store.add("done", 0) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def _collect(pipes: Sequence, ranks: Sequence, timeout_s: float) -> list:
    """Results in rank order, or the failure that the others follow from."""
    results: dict[int, object] = {}
    lost: RankLost | LaunchError | None = None
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        open_pipes = {pipes[r]: r for r in range(len(pipes)) if r not in results}
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(open_pipes.values())
            raise lost or RankLost(f"ranks {missing} did not finish within {timeout_s:g} s")
        for pipe in ready:
            rank = open_pipes[pipe]
            try:
                results[rank] = _receive(pipe, rank, ranks[rank])
            except (LaunchError, RankLost) as error:
                if "raised RankLost" not in str(error):
                    raise
                # What follows from a cause may be told before it: the cause is on its way.
                results[rank], lost = None, lost or error
                deadline = min(deadline, time.monotonic() + CAUSE_S)
    if lost:
        raise lost
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe, rank: int, process) -> object:
    try:
        kind, *content = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(5)
        code = process.exitcode
        raise RankLost(f"rank {rank} ended without a result, exit code {code}") from None
    if kind == "error":
        raise LaunchError(f"rank {rank} raised {content[0]}\n{content[1]}")
    return content[0]
