"""The mesh: ranks along named axes, and the collectives between them.

`Mesh` is the contract, `process.ProcessMesh` carries it over torch.distributed, `join.init_mesh`
makes the one a plan asks for. Nothing here reads a default group: the mesh is an argument.
"""

from __future__ import annotations

import contextlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import torch

from stretto import axes
from stretto.errors import ConfigError

Result = TypeVar("Result")

#: Seconds a wait may last before its peers are reported lost.
TIMEOUT_S = 300.0
#: How often that is the limit while ranks warm up: kernels load and models compile at first use.
WARMING_UP = 3
#: Bytes of the first message of gathered and of sent byte strings; most need no second one.
_SHORT, _LONG = 256, 2**14


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
        self._peers: dict[str | None, list[int]] = {None: list(range(self.world_size))}

    @property
    def world_size(self) -> int:
        return axes.world_size(self.sizes)

    def size(self, axis: str | None) -> int:
        """Number of ranks on an axis."""
        return len(self.peers(axis))

    def rank(self, axis: str | None) -> int:
        """This rank's position on an axis."""
        return self.peers(axis).index(self.world_rank)

    def peers(self, axis: str | None) -> list[int]:
        """World ranks of this rank's group on an axis, in axis order; not to be changed.

        Raises ConfigError for an axis that no mesh has.
        """
        try:
            if axis is not None and axis not in self._peers:
                self._peers[axis] = axes.peers(self.world_rank, axis, self.sizes)
            return self._peers[axis]
        except (KeyError, TypeError):
            raise ConfigError(
                f"axis {axis!r}: no mesh has it\n"
                f"  to fix: {', '.join(axes.NAMES)}, or None for all {self.world_size} ranks"
            ) from None

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
        firsts = self.all_gather(_framed(data, _SHORT), axis, "control").wait()
        counts, heads = zip(*map(_unframed, firsts), strict=True)
        left = max(counts) - len(heads[0])
        if left <= 0:
            return [head[:count] for head, count in zip(heads, counts, strict=True)]
        rest = _byte_tensor(data[len(heads[0]) :].ljust(left, b"\0"))
        lasts = map(_bytes_of, self.all_gather(rest, axis, "control").wait())
        return [(a + b)[:n] for a, b, n in zip(heads, lasts, counts, strict=True)]

    def broadcast_bytes(self, data: bytes, axis: str | None = None, src: int = 0) -> bytes:
        """The byte string of position `src`; what other ranks pass is ignored."""
        data = data if self.rank(axis) == src else b""
        first = self.broadcast(_framed(data, _LONG), axis, src, "control").wait()
        count, head = _unframed(first)
        if count <= len(head):
            return head[:count]
        rest = _byte_tensor(data[len(head) :].ljust(count - len(head), b"\0"))
        return head + _bytes_of(self.broadcast(rest, axis, src, "control").wait())


def _framed(data: bytes, size: int) -> torch.Tensor:
    """The length of `data` and as much of it as fits into `size` bytes."""
    return _byte_tensor((struct.pack("<Q", len(data)) + data[: size - 8]).ljust(size, b"\0"))


def _unframed(frame: torch.Tensor) -> tuple[int, bytes]:
    """The length of the whole, and what came of it with padding."""
    read = _bytes_of(frame)
    return struct.unpack_from("<Q", read)[0], read[8:]


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _no_bytes()


def _no_bytes() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.uint8)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
