"""The mesh: ranks along named axes, and the collectives between them.

`Mesh` is the contract, `process.ProcessMesh` carries it over torch.distributed, `init_mesh` makes
the one a plan asks for. Nothing here reads a default group: the mesh is an argument.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from datetime import timedelta
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from stretto import axes
from stretto.errors import ConfigError, PlanMismatch

Result = TypeVar("Result")

#: Seconds a wait may last before its peers are reported lost.
TIMEOUT_S = 300.0
#: How often that is the limit while ranks warm up: kernels load and models compile at first use.
WARMING_UP = 3
CARRIERS = ("auto", "nccl", "symmetric", "gloo")
#: What torch does after an error of NCCL: 1, set by torchrun, and 3 end the process by a signal,
#: before it can say which rank it lost; 2 ends the waits, and what follows raises.
_ON_NCCL_ERROR, _ENDS_PROCESS = "TORCH_NCCL_ASYNC_ERROR_HANDLING", ("1", "3")


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
    """Ranks along axes, plain or composite. Axis None means all ranks, in rank order.

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
        #: What all ranks have found to be the same, so that it need not be compared again.
        self.agreed: set[Hashable] = set()
        self._place: dict[str | None, int] = {None: rank}
        self._peers: dict[str | None, list[int]] = {None: list(range(self.world_size))}
        for axis in axes.NAMES:
            self._place[axis] = axes.position(rank, axis, self.sizes)
            self._peers[axis] = axes.peers(rank, axis, self.sizes)

    @property
    def world_size(self) -> int:
        return axes.world_size(self.sizes)

    def size(self, axis: str | None) -> int:
        """Number of ranks on an axis."""
        return len(self._peers[axis])

    def rank(self, axis: str | None) -> int:
        """This rank's position on an axis."""
        return self._place[axis]

    def peers(self, axis: str | None) -> list[int]:
        """World ranks of this rank's group on an axis, in axis order; not to be changed."""
        return self._peers[axis]

    @abstractmethod
    def all_gather(
        self, tensor: torch.Tensor, axis: str | None, phase: str
    ) -> Pending[list[torch.Tensor]]:
        """Every rank's tensor, as a list in axis order; shapes and dtypes are equal."""

    @abstractmethod
    def all_reduce(
        self, tensor: torch.Tensor, axis: str | None, phase: str
    ) -> Pending[torch.Tensor]:
        """The sum of every rank's tensor, in place; bitwise equal on all ranks of the axis.

        The order of the sum is the carrier's, so two carriers may differ by rounding.
        """

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
    def exchange(
        self,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        axis: str | None,
        phase: str,
        *,
        verb: str = "exchange",
        channel: int = 0,
    ) -> Pending[dict[int, torch.Tensor]]:
        """Send `sends[p]` to position p and fill `receives[p]` with what position p sent here.

        Sizes may differ from pair to pair; both ends of a message have equal size and dtype, and
        an empty tensor is no message. An entry for oneself is copied. `sends` may be changed
        and `receives` read after `wait()`, whose result is `receives`. Every rank of the axis
        takes part, also with nothing. Exchanges of one `channel` follow one another, those of
        different channels may overtake; `verb` is what bytes are recorded under.
        """

    @abstractmethod
    def record(self, stage: str, *, waiting: bool = False) -> None:
        """Note what this rank is doing, so that a timeout elsewhere can name the laggard."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End the waits of every rank of the mesh: they raise RankLost with this reason."""

    def allow(self, timeout_s: float) -> None:
        """From here on this rank's waits may last so long, up to WARMING_UP times the first limit.

        All ranks allow the same at the same places.
        """
        self.timeout_s = timeout_s

    @abstractmethod
    def check(self) -> None:
        """Raise RankLost when a rank has ended the mesh; verbs do this themselves."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the mesh holds beside its groups; collectives may not follow."""

    @contextlib.contextmanager
    def ending_peers(self, what: str) -> Iterator[None]:
        """Inside, an error of this rank ends its peers' waits within about a second.

        Peers raise RankLost that names this rank, `what` and the error.
        """
        try:
            yield
        except BaseException as error:
            self.abort(f"{what}: {type(error).__name__}: {error}")
            raise
        self.check()

    def copy_own(
        self,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        axis: str | None,
    ) -> None:
        """The part of an exchange that stays here; no carrier sends to itself."""
        here = self.rank(axis)
        assert (here in sends) == (here in receives), "an entry for oneself is sent and received"
        if here in sends and sends[here].numel():
            receives[here].copy_(sends[here])

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


def init_mesh(
    plan: Sized,
    *,
    device: torch.device | str | None = None,
    timeout_s: float = TIMEOUT_S,
    carrier: str = "auto",
) -> Mesh:
    """The mesh a plan asks for, over the ranks that torchrun (or the caller) started.

    `device` None takes `cuda:LOCAL_RANK` where there is one, else the CPU. Without a launcher a
    plan of one rank needs no process group. `carrier` moves GPU tensors: nccl wants a GPU per
    rank, symmetric (torch's symmetric memory) all ranks on one node, gloo copies through the
    host. auto: nccl where it can; else, for ranks that share GPUs, symmetric if the plan splits
    sequences, else gloo. Raises PlanMismatch when degrees and ranks differ, ConfigError for a
    carrier that cannot.
    """
    if carrier not in CARRIERS:
        raise ConfigError(f"carrier {carrier!r} is unknown; known are {', '.join(CARRIERS)}")
    wanted = axes.world_size(plan.sizes)
    if not dist.is_initialized() and "RANK" not in os.environ:
        return _alone(plan, wanted, device, timeout_s)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(device) if device else _own_device(local)
    store = _join(chosen, timeout_s, carrier)
    if dist.get_world_size() != wanted:
        degrees = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1)
        raise PlanMismatch(
            f"the plan needs {wanted} ranks ({degrees or 'one'}) but {dist.get_world_size()} were "
            "started; change the degrees or the number of ranks"
        )
    return _carried(plan, chosen, carrier)(plan.sizes, chosen, store, timeout_s=timeout_s)


def _carried(plan: Sized, device: torch.device, carrier: str) -> Callable[..., Mesh]:
    """Which kind of mesh moves tensors of this device."""
    from stretto.mesh.process import ProcessMesh

    if device.type != "cuda":
        if carrier in ("nccl", "symmetric"):
            raise ConfigError(f"carrier {carrier} moves GPU tensors, the mesh is on {device.type}")
        return ProcessMesh
    torch.cuda.set_device(device)
    from stretto.mesh.symmetric import SymmetricMesh, require_one_node, share_devices

    ranks, local_ranks = dist.get_world_size(), _local_ranks()
    shared = local_ranks > torch.cuda.device_count()
    splits = axes.size("cp", axes.ordered(plan.sizes)) > 1
    if carrier == "auto" and shared and splits and local_ranks == ranks:
        carrier = "symmetric"
    if carrier == "nccl" and "nccl" not in dist.get_backend_config():
        raise ConfigError(
            f"carrier nccl wants a GPU per rank, but {local_ranks} ranks have "
            f"{torch.cuda.device_count()} here\n  to fix: carrier symmetric, or auto"
        )
    if carrier != "symmetric":
        return ProcessMesh
    require_one_node(ranks, local_ranks)
    if shared:
        share_devices()
    return SymmetricMesh


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


def _join(device: torch.device, timeout_s: float, carrier: str) -> dist.Store:
    """Enter the job's process group unless the caller did; its store carries our records."""
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_s)
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        backend = "gloo" if carrier == "gloo" else _backend(device)
        if os.environ.get(_ON_NCCL_ERROR, "1") in _ENDS_PROCESS:
            os.environ[_ON_NCCL_ERROR] = "2"
        dist.init_process_group(
            backend=backend, store=store, rank=rank, world_size=world, timeout=limit
        )
    else:
        store = dist.distributed_c10d._get_default_store()
    # Ranks make their meshes in the same order; each mesh has records of its own.
    own = dist.PrefixStore("stretto", store)
    number = own.add(f"meshes/{dist.get_rank()}", 1)
    return dist.PrefixStore(f"stretto/{number}", store)


def _backend(device: torch.device) -> str:
    """NCCL wants a GPU per rank; ranks that share one talk through gloo."""
    if device.type == "cuda" and _local_ranks() <= torch.cuda.device_count():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _no_bytes()


def _no_bytes() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.uint8)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
