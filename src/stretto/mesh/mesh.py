"""The mesh: ranks along named axes, and the collectives between them.

`Mesh` is the contract, `ProcessMesh` carries it over torch.distributed, `init_mesh` makes the one
a plan asks for. Nothing here reads a default group: the mesh is an argument.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from stretto import axes
from stretto.errors import MeshTimeout, PlanMismatch, RankLost

Result = TypeVar("Result")

#: Seconds a wait may last before its peers are reported lost.
TIMEOUT_S = 300.0


class Sized(Protocol):
    """What a mesh needs of a plan: the axis sizes."""

    @property
    def sizes(self) -> Mapping[str, int]: ...


class Pending(Generic[Result]):
    """A collective under way; `wait()` gives its result and may be called once."""

    def __init__(self, finish: Callable[[], Result]):
        self._finish: Callable[[], Result] | None = finish

    def wait(self) -> Result:
        finish, self._finish = self._finish, None
        assert finish is not None, "a pending collective is waited for once"
        return finish()


class Mesh(ABC):
    """Ranks along axes. Axis None means all ranks, in rank order.

    Verbs return `Pending`; inputs are contiguous, dtypes unchanged. `phase` names the work that
    the bytes belong to. Every wait ends within `timeout_s` seconds: MeshTimeout or RankLost.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        rank: int,
        device: torch.device | str = "cpu",
        timeout_s: float = TIMEOUT_S,
    ):
        self.sizes = axes.ordered(sizes)
        self.world_rank = rank
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self._place = axes.coordinates(rank, self.sizes)

    @property
    def world_size(self) -> int:
        return axes.world_size(self.sizes)

    def size(self, axis: str | None) -> int:
        """Number of ranks on an axis."""
        return self.world_size if axis is None else self.sizes[axis]

    def rank(self, axis: str | None) -> int:
        """This rank's position on an axis."""
        return self.world_rank if axis is None else self._place[axis]

    def peers(self, axis: str | None) -> list[int]:
        """World ranks of this rank's group on an axis, in axis order."""
        if axis is None:
            return list(range(self.world_size))
        return axes.peers(self.world_rank, axis, self.sizes)

    @abstractmethod
    def all_gather(
        self, tensor: torch.Tensor, axis: str | None, phase: str
    ) -> Pending[list[torch.Tensor]]:
        """Every rank's tensor, as a list in axis order; shapes and dtypes are equal."""

    @abstractmethod
    def broadcast(
        self, tensor: torch.Tensor, axis: str | None, src: int, phase: str
    ) -> Pending[torch.Tensor]:
        """The tensor of axis position `src`; elsewhere `tensor` is the buffer that receives it."""

    @abstractmethod
    def permute(
        self, tensor: torch.Tensor, axis: str | None, moves: Mapping[int, int], phase: str
    ) -> Pending[torch.Tensor | None]:
        """Send from source to destination positions; only ranks named in `moves` call this.

        On a destination `tensor` is the receive buffer's model, and the result what arrived; on a
        source that receives nothing the result is None.
        """

    @abstractmethod
    def record(self, stage: str, *, waiting: bool = False) -> None:
        """Note what this rank is doing, so that a timeout elsewhere can name the laggard."""

    def barrier(self, axis: str | None = None) -> None:
        """Return once every rank of the axis is here."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8), axis, "control").wait()

    def gather_bytes(self, data: bytes, axis: str | None = None) -> list[bytes]:
        """Byte strings of any length from every rank, in axis order."""
        counts = self.all_gather(torch.tensor([len(data)]), axis, "control").wait()
        longest = max(int(count) for count in counts)
        padded = _byte_tensor(data.ljust(longest, b"\0"))
        parts = self.all_gather(padded, axis, "control").wait()
        return [_bytes_of(p)[: int(n)] for p, n in zip(parts, counts, strict=True)]

    def broadcast_bytes(self, data: bytes, axis: str | None = None, src: int = 0) -> bytes:
        """The byte string of position `src`; what other ranks pass is ignored."""
        mine = self.rank(axis) == src
        count = torch.tensor([len(data) if mine else 0])
        length = int(self.broadcast(count, axis, src, "control").wait())
        buffer = _byte_tensor(data if mine else bytes(length))
        return _bytes_of(self.broadcast(buffer, axis, src, "control").wait())


class ProcessMesh(Mesh):
    """Ranks as processes of one torch.distributed job."""

    def __init__(
        self, sizes: Mapping[str, int], device: torch.device | str, store: dist.Store, **kwargs
    ):
        super().__init__(sizes, dist.get_rank(), device, **kwargs)
        self._store = store
        self._groups = {axis: self._own_group(axis) for axis in (*self.sizes, None)}

    def _own_group(self, axis: str | None) -> dist.ProcessGroup | None:
        """Groups of one axis; every rank creates all of them, in the same order."""
        own: dist.ProcessGroup | None = None
        done: set[tuple[int, ...]] = set()
        for rank in range(self.world_size):
            members = tuple(axes.peers(rank, axis, self.sizes) if axis else self.peers(None))
            if members in done or len(members) == 1:
                continue
            done.add(members)
            group = dist.new_group(list(members), timeout=timedelta(seconds=self.timeout_s))
            if self.world_rank in members:
                assert isinstance(group, dist.ProcessGroup), "a member gets its group"
                own = group
        return own

    def all_gather(self, tensor, axis, phase):
        group = self._groups[axis]
        if group is None:
            return Pending(lambda: [tensor])
        parts = [torch.empty_like(tensor) for _ in range(self.size(axis))]
        work = self._start(dist.all_gather, parts, tensor, group=group)
        return Pending(lambda: self._finish(work, parts, axis, "all_gather"))

    def broadcast(self, tensor, axis, src, phase):
        group = self._groups[axis]
        if group is None:
            return Pending(lambda: tensor)
        root = self.peers(axis)[src]
        work = self._start(dist.broadcast, tensor, src=root, group=group)
        return Pending(lambda: self._finish(work, tensor, axis, "broadcast"))

    def permute(self, tensor, axis, moves, phase):
        group, peers, here = self._groups[axis], self.peers(axis), self.rank(axis)
        assert group is not None, f"permute on axis {axis} of one rank"
        works, buffer = [], None
        for src, dst in moves.items():
            if here == src:
                works.append(self._start(dist.isend, tensor, peers[dst], group=group))
            elif here == dst:
                buffer = torch.empty_like(tensor)
                works.append(self._start(dist.irecv, buffer, peers[src], group=group))

        def finish():
            for work in works:
                self._finish(work, None, axis, "permute")
            return buffer

        return Pending(finish)

    def record(self, stage, *, waiting=False):
        note = {"time": time.time(), "stage": stage, "waiting": waiting}
        self._store.set(f"record/{self.world_rank}", json.dumps(note))

    def _start(self, call: Callable, *args, **kwargs):
        if call not in (dist.isend, dist.irecv):
            kwargs["async_op"] = True
        return call(*args, **kwargs)

    def _finish(self, work, result, axis: str | None, verb: str):
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise self._lost(axis, verb, error) from None
        return result

    def _lost(self, axis: str | None, verb: str, error: RuntimeError) -> MeshTimeout:
        """The error of a failed wait, naming peers that were not waiting themselves."""
        where = "all ranks" if axis is None else f"axis {axis}"
        cause = str(error).strip().splitlines()[0][:200]
        head = f"rank {self.world_rank}: {verb} on {where} failed"
        try:
            notes = {rank: self._note_of(rank) for rank in self.peers(axis)}
        except RuntimeError:
            return RankLost(f"{head}, and so did the launcher's store ({cause})")
        lost = {r: n for r, n in notes.items() if r != self.world_rank and not n["waiting"]}
        if not lost:
            return MeshTimeout(
                f"{head}: no answer within {self.timeout_s:g} s ({cause}); raise timeout_s"
            )
        names = "; ".join(_describe(rank, note) for rank, note in lost.items())
        return RankLost(f"{head}, lost: {names} ({cause})")

    def _note_of(self, rank: int) -> dict:
        key = f"record/{rank}"
        if not self._store.check([key]):
            return {"time": None, "stage": "nothing yet", "waiting": False}
        return json.loads(self._store.get(key))


def init_mesh(
    plan: Sized, *, device: torch.device | str | None = None, timeout_s: float = TIMEOUT_S
) -> Mesh:
    """The mesh a plan asks for, over the ranks that torchrun (or the caller) started.

    `device` None takes `cuda:LOCAL_RANK` where there is one, else the CPU. Without a launcher a
    plan of one rank needs no process group. Raises PlanMismatch when degrees and ranks differ.
    """
    wanted = axes.world_size(plan.sizes)
    if not dist.is_initialized() and "RANK" not in os.environ:
        return _alone(plan, wanted, device, timeout_s)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(device) if device else _own_device(local)
    store = _join(chosen, timeout_s)
    if dist.get_world_size() != wanted:
        degrees = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
        raise PlanMismatch(
            f"the plan needs {wanted} ranks ({degrees}) but {dist.get_world_size()} were started; "
            "change the degrees or the number of ranks"
        )
    return ProcessMesh(plan.sizes, chosen, store, timeout_s=timeout_s)


def _alone(plan: Sized, wanted: int, device, timeout_s: float) -> Mesh:
    from stretto.mesh.local import LocalWorld

    if wanted != 1:
        raise PlanMismatch(
            f"the plan needs {wanted} ranks but this process was started alone; start it with "
            f"torchrun --nproc-per-node {wanted}, or use stretto generate --ranks {wanted}"
        )
    return LocalWorld(plan.sizes, device=device or _own_device(0), timeout_s=timeout_s).mesh(0)


def _own_device(local: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local % torch.cuda.device_count())


def _join(device: torch.device, timeout_s: float) -> dist.Store:
    """Enter the job's process group unless the caller did; its store carries our records."""
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_s)
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        dist.init_process_group(
            backend=_backend(device), store=store, rank=rank, world_size=world, timeout=limit
        )
    else:
        store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore("stretto", store)


def _backend(device: torch.device) -> str:
    """NCCL wants a GPU per rank; ranks that share one talk through gloo."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and local_ranks <= torch.cuda.device_count():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _describe(rank: int, note: Mapping) -> str:
    if note["time"] is None:
        return f"rank {rank} (recorded nothing)"
    return f"rank {rank} ({time.time() - note['time']:.1f} s ago: {note['stage']})"


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _no_bytes()


def _no_bytes() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.uint8)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
