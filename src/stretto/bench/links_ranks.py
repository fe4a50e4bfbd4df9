"""Ranks on emulated nodes: processes over gloo that do what the benchmark's process asks.

A rank enters its node's namespace before anything opens a connection. Passes start at an agreed
moment of the machine's one clock, and last until the last rank has ended.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.bench.links_nodes import Place
from stretto.errors import LaunchError, RankLost
from stretto.mesh.join import init_mesh
from stretto.mesh.mesh import Mesh
from stretto.ops.attention import backends
from stretto.ops.attention.backends import Backend
from stretto.ops.attention.merge import accumulators
from stretto.ops.attention.rank import Saved, backward_rank, forward_rank
from stretto.plan.options import AttentionCase, Context
from stretto.plan.ranges import Piece
from stretto.testing.ranks import PRELOAD, Axes

#: Seconds for the ranks to start, and for any of their answers.
_START_S = 180.0
_ANSWER_S = 120.0
#: Seconds between asking for a pass and its start: time for the question to arrive.
_AHEAD_S = 0.03
_PORT = 29511


# ---- the benchmark's process -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """One pass of all ranks. `seconds`: from the agreed start to the last rank's end.

    `late`: how long after that moment the last rank began. `own`, `others`: cores that the ranks,
    and everything else on the machine, kept busy meanwhile.
    """

    seconds: float
    late: float
    own: float
    others: float


class Fleet:
    """Ranks at `places`, in rank order; they have ended when the context is left."""

    def __init__(self, places: Sequence[Place]):
        self.places = tuple(places)
        self._ranks: list[Any] = []
        self._pipes: list[Any] = []

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def __enter__(self) -> Fleet:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "stretto.testing.ranks", __name__])
        # One thread per rank: more threads than cores spin against each other. Addresses of
        # namespaces have no names, which torch would remark for every connection.
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        try:
            for rank in range(len(self.places)):
                pipe, end = context.Pipe()
                job = (rank, self.places, end, list(sys.path))
                process = context.Process(target=_rank, args=job, daemon=True)
                process.start()
                end.close()
                self._ranks.append(process)
                self._pipes.append(pipe)
            self._answers(_START_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def ask(self, order: str, *args: Any) -> list[Any]:
        """Every rank's answer to one order, in rank order. Raises LaunchError, RankLost."""
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((order, *args))
            except OSError:
                raise RankLost(f"rank {rank} is gone, asked for {order}") from None
        return self._answers(_ANSWER_S)

    def timed(self, order: str, *args: Any) -> Timing:
        """The time of a pass."""
        before, start = _busy_seconds(), time.monotonic() + _AHEAD_S
        asked = time.monotonic()
        found = self.ask(order, start, *args)
        passed, busy = time.monotonic() - asked, _busy_seconds() - before
        own = sum(answer["cpu"] for answer in found)
        return Timing(
            seconds=max(answer["ended"] for answer in found) - start,
            late=max(answer["began"] for answer in found) - start,
            own=own / passed,
            others=max(0.0, busy - own) / passed,
        )

    def _answers(self, limit_s: float) -> list[Any]:
        """Whoever answers first is heard first: an error of one explains the silence of others."""
        found: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + limit_s
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(map(str, waiting.values()))
                raise RankLost(f"rank {silent} gave no answer within {limit_s:g} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                found[rank] = _received(rank, pipe)
        return [found[rank] for rank in sorted(found)]

    def _end(self) -> None:
        """By the ids of the processes that were started here."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.join()
        for pipe in self._pipes:
            pipe.close()


def _received(rank: int, pipe: Any) -> Any:
    """A rank's answer. Raises LaunchError for its error, RankLost where it has ended."""
    try:
        kind, answer = pipe.recv()
    except (EOFError, OSError):
        raise RankLost(f"rank {rank} ended without an answer") from None
    if kind == "error":
        raise LaunchError(f"rank {rank} raised {answer}")
    return answer


def _busy_seconds() -> float:
    """Processor time spent on this machine, but for interrupts: those carry the ranks' bytes."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _waiting, _irq, _softirq, steal = map(
            int, file.readline().split()[1:9]
        )
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


# ---- a rank ------------------------------------------------------------------------------------


def _rank(rank: int, places: Sequence[Place], pipe: Any, path: list[str]) -> None:
    """Body of a rank: join, then answer orders until there are no more."""
    # Ctrl-C reaches every process of a terminal; whoever started the ranks ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    try:
        torch.set_num_threads(1)
        worker = _joined(rank, places)
        pipe.send(("answer", None))
        while True:
            order, *args = pipe.recv()
            pipe.send(("answer", getattr(worker, order)(*args)))
    except EOFError:
        return
    except BaseException as error:  # noqa: BLE001 - everything crosses to the parent
        with contextlib.suppress(OSError):
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            pipe.send(("error", text))


def _joined(rank: int, places: Sequence[Place]) -> Worker:
    places[rank].enter()
    os.environ["GLOO_SOCKET_IFNAME"] = places[rank].interface
    limit = timedelta(seconds=_START_S)
    store = dist.TCPStore(places[0].address, _PORT, len(places), is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(places), timeout=limit)
    return Worker()


@dataclass(slots=True)
class Task:
    """A plan and a call, ready to run; `saved` lies between forward and backward."""

    mesh: Mesh
    context: Context
    case: AttentionCase
    backend: Backend
    tensors: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    saved: Saved | None = None


@dataclass(slots=True)
class Worker:
    """What a rank can be asked. One mesh serves all plans of equal axes."""

    meshes: dict[tuple, Mesh] = field(default_factory=dict)
    tasks: dict[int, Task] = field(default_factory=dict)

    def prepare(
        self,
        number: int,
        sizes: Mapping[str, int],
        context: Context,
        case: AttentionCase,
        rates: tuple[float, float],
    ) -> None:
        """Make what the task of this number needs; the call is causal, of equal shards."""
        mesh = self._mesh(sizes)
        case = case.at(mesh.rank("cp"))
        generator = torch.Generator().manual_seed(case.rank)

        def draw(heads: int) -> Tensor:
            shape = (case.batch, heads, case.q_rows[case.rank].rows, case.head_dim)
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tensors = draw(case.heads_q), draw(case.heads_kv), draw(case.heads_kv)
        backend = sleeping(*rates)
        self.tasks[number] = Task(mesh, context, case, backend, tensors, draw(case.heads_q))

    def forward(self, start: float, number: int) -> dict[str, float]:
        task = self.tasks[number]
        with _Clock(start) as clock:
            *_, task.saved = forward_rank(
                *task.tensors,
                mesh=task.mesh,
                context=task.context,
                case=task.case,
                backend=task.backend,
            )
        return clock.read()

    def backward(self, start: float, number: int) -> dict[str, float]:
        task = self.tasks[number]
        assert task.saved is not None, "forward comes first"
        with _Clock(start) as clock:
            backward_rank(task.dout, task.saved)
        task.saved = None
        return clock.read()

    def shift(
        self, start: float, sizes: Mapping[str, int], counts: Mapping[str, int], hops: int
    ) -> dict[str, float]:
        """All ranks send `counts[axis]` bytes to the next on every axis at once, `hops` times."""
        mesh = self._mesh(sizes)
        buffers = {
            axis: [torch.zeros(count, dtype=torch.uint8) for _ in range(2)]
            for axis, count in counts.items()
        }
        with _Clock(start) as clock:
            for _ in range(hops):
                under_way = []
                for axis, (out, into) in buffers.items():
                    here, size = mesh.rank(axis), mesh.size(axis)
                    sends, receives = {(here + 1) % size: out}, {(here - 1) % size: into}
                    under_way.append(mesh.exchange(sends, receives, axis, "rates"))
                for pending in under_way:
                    pending.wait()
        return clock.read()

    def steps(
        self, start: float, count: int, shape: tuple[int, int, int, int], back: bool
    ) -> dict[str, float]:
        """`count` steps of kernels that take no time; `shape`: rows, heads, key heads, head_dim."""
        rows, heads, kv_heads, head_dim = shape
        backend, pieces = sleeping(math.inf, math.inf), [Piece((0, rows), (0, rows), "full")]

        def zeros(heads: int) -> Tensor:
            return torch.zeros(rows, 1, heads, head_dim, dtype=torch.float64)

        q, k, v, dout, out = map(zeros, (heads, kv_heads, kv_heads, heads, heads))
        acc, lse = accumulators(q)
        dq = torch.zeros_like(q)
        with _Clock(start) as clock:
            for _ in range(count):
                if not back:
                    backends.attend_(acc, lse, q, k, v, pieces, 1.0, backend)
                    continue
                # Sums of keys begin anew in every step, those of queries live as long as the walk.
                sums = dq, torch.zeros_like(k), torch.zeros_like(v)
                backends.attend_backward_(sums, dout, q, k, v, out, lse, pieces, 1.0, backend)
        return clock.read()

    def _mesh(self, sizes: Mapping[str, int]) -> Mesh:
        key = tuple(sizes.items())
        if key not in self.meshes:
            self.meshes[key] = init_mesh(Axes(sizes), device="cpu", timeout_s=_ANSWER_S)
        return self.meshes[key]


class _Clock:
    """From an agreed moment, for which it waits, to the end of what is done inside."""

    def __init__(self, start: float):
        self.start = start

    def __enter__(self) -> _Clock:
        time.sleep(max(0.0, self.start - time.monotonic()))
        self.began, self._cpu = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended, self.cpu = time.monotonic(), time.process_time() - self._cpu

    def read(self) -> dict[str, float]:
        return {"began": self.began, "ended": self.ended, "cpu": self.cpu}


# ---- a kernel that takes time and computes nothing -----------------------------------------------


def sleeping(forward_rate: float, backward_rate: float) -> Backend:
    """A back end whose kernels sleep as long as their FLOP take at these rates.

    Results are the inputs, of right shape and without meaning; all that surrounds kernels is done
    as ever, so the same plan moves the same bytes.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float):
        _sleep(4.0, q, k, causal, forward_rate)
        return q, q.new_zeros(q.shape[:-1])

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ):
        _sleep(10.0, q, k, causal, backward_rate)
        return q, k, v

    return Backend(
        name="sleeping",
        forward=forward,
        backward=backward,
        devices=("cpu",),
        dtypes=(torch.float64,),
    )


def _sleep(per_pair: float, q: Tensor, k: Tensor, causal: bool, flop_rate: float) -> None:
    """`q` is (n, H, r, D) and `k` (n, G, s, D); a causal square shows row i its keys 0..i."""
    count, heads, rows, head_dim = q.shape
    pairs = rows * (rows + 1) / 2 if causal else rows * k.shape[2]
    seconds = per_pair * head_dim * count * heads * pairs / flop_rate
    if seconds > 1e-6:
        time.sleep(seconds)
