"""Messages through torch's symmetric memory, between the GPUs or GPU slices of one node.

Every rank has an inbox in which each peer owns two slots per channel. A message is cut into pieces
of a slot: the writer copies a piece into the reader's slot and signals, the reader copies it out
and signals back, and only then is that slot filled again. Both happen on the device, on two streams
per channel, so the host never waits and the next hop moves while the caller computes.

Nothing can lock up, even if a device runs all its streams as one queue: of piece n all ranks send
before they receive, and a send waits for nothing but the reading of piece n - 2.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stretto.errors import ConfigError
from stretto.mesh.abort import Await
from stretto.mesh.process import ProcessMesh

#: Concurrent streams of messages that have slots.
CHANNELS = 3
#: Bytes of a rank's inbox, shared by its peers; slots are powers of two of it.
INBOX_BYTES = 256 * 2**20
_SLOTS = 2
_FULL, _FREE = 0, 1
_WRITE, _READ = LANES = (0, 1)
#: Seconds for which a rank that gives up keeps answering its own waiting kernels.
_RELEASE_S = 5.0


class Mark(Protocol):
    """A point on both streams of a channel."""

    def join(self) -> None:
        """What the caller issues from here on comes after it."""

    def done(self) -> bool: ...


class Board(Protocol):
    """Memory that peers write into, signals between them, and streams that order both."""

    rank: int
    slot_bytes: int

    def slot(self, owner: int, writer: int, channel: int, parity: int) -> torch.Tensor:
        """Bytes in the owner's memory that the writer fills."""

    def begin(self, channel: int) -> None:
        """What the channel's streams get from here on comes after what the caller has issued."""

    def stream(self, channel: int, lane: int) -> contextlib.AbstractContextManager[None]:
        """What is issued inside goes to the channel's stream that writes, or that reads."""

    def mark(self, channel: int) -> Mark: ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def put(self, peer: int, pad: int) -> None:
        """Set this rank's signal on a peer's pad, which is clear."""

    def wait(self, peer: int, pad: int) -> None:
        """Until the peer's signal is set on this rank's pad; clears it."""

    def release(self) -> None:
        """Answer this rank's own waits until its streams are empty: the mesh is lost."""


class Mailboxes:
    """The protocol: who may write into which slot when. The board carries it out."""

    def __init__(self, board: Board):
        self.board = board
        self._sent: Counter[tuple[int, int]] = Counter()
        self._read: Counter[tuple[int, int]] = Counter()

    def exchange(
        self,
        out: Sequence[tuple[int, torch.Tensor]],
        into: Sequence[tuple[int, torch.Tensor]],
        channel: int,
    ) -> Mark:
        """Send tensors to ranks and fill tensors from ranks; contiguous, of one size per message.

        Two ranks issue the messages between them on a channel in the same order.
        """
        leaving = [(rank, self._pieces(tensor)) for rank, tensor in out]
        arriving = [(rank, self._pieces(tensor)) for rank, tensor in into]
        longest = max((len(pieces) for _, pieces in (*leaving, *arriving)), default=0)
        self.board.begin(channel)
        for number in range(longest):
            with self.board.stream(channel, _WRITE):
                for rank, pieces in leaving:
                    if number < len(pieces):
                        self._send(rank, pieces[number], channel)
            with self.board.stream(channel, _READ):
                for rank, pieces in arriving:
                    if number < len(pieces):
                        self._receive(rank, pieces[number], channel)
        return self.board.mark(channel)

    def _pieces(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = tensor.detach().view(-1).view(torch.uint8)
        return flat.split(self.board.slot_bytes)

    def _send(self, reader: int, piece: torch.Tensor, channel: int) -> None:
        count = self._sent[reader, channel]
        parity = count % _SLOTS
        if count >= _SLOTS:
            self.board.wait(reader, pad_of(channel, parity, _FREE))
        slot = self.board.slot(reader, self.board.rank, channel, parity)
        self.board.copy(slot[: piece.numel()], piece)
        self.board.put(reader, pad_of(channel, parity, _FULL))
        self._sent[reader, channel] += 1

    def _receive(self, writer: int, piece: torch.Tensor, channel: int) -> None:
        parity = self._read[writer, channel] % _SLOTS
        slot = self.board.slot(self.board.rank, writer, channel, parity)
        self.board.wait(writer, pad_of(channel, parity, _FULL))
        self.board.copy(piece, slot[: piece.numel()])
        self.board.put(writer, pad_of(channel, parity, _FREE))
        self._read[writer, channel] += 1


def pad_of(channel: int, parity: int, kind: int) -> int:
    """Number of a signal between two ranks."""
    return (channel * _SLOTS + parity) * 2 + kind


#: Signals between two ranks, and one to warm up with.
PADS = CHANNELS * _SLOTS * 2 + 1


def slot_bytes_for(ranks: int, inbox_bytes: int = INBOX_BYTES) -> int:
    """The largest power of two of which every peer gets its slots in an inbox."""
    share = inbox_bytes // (max(1, ranks - 1) * CHANNELS * _SLOTS)
    return 1 << (share.bit_length() - 1)


def slot_index(owner: int, writer: int, channel: int, parity: int) -> int:
    """Where a slot lies in the owner's inbox, in slots; nobody writes to oneself."""
    place = writer if writer < owner else writer - 1
    return (place * CHANNELS + channel) * _SLOTS + parity


class DeviceBoard:
    """Symmetric memory of one process per rank, on CUDA. Making one is a collective call."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup, slot_bytes: int):
        import torch.distributed._symmetric_memory as symm_mem

        self.rank, self.size = group.rank(), group.size()
        self.device = device
        self.slot_bytes = slot_bytes
        num_bytes = (self.size - 1) * CHANNELS * _SLOTS * slot_bytes
        pads = self.size * PADS * 4
        if symm_mem.get_signal_pad_size() < pads:
            symm_mem.set_signal_pad_size(pads)
        with torch.cuda.device(device):
            self._memory = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
            self._handle = symm_mem.rendezvous(self._memory, group.group_name)
            self._inboxes = [
                self._handle.get_buffer(rank, (num_bytes,), torch.uint8)
                for rank in range(self.size)
            ]
            # (signal, writer): what each rank's kernels wait for, and who sets it.
            self._pads = [
                self._handle.get_signal_pad(rank, (PADS, self.size), torch.int32)
                for rank in range(self.size)
            ]
            self._lanes = [
                [torch.cuda.Stream(device, priority=-1) for _ in LANES] for _ in range(CHANNELS)
            ]
            self._rescue = torch.cuda.Stream(device, priority=-1)
            self._warm_up()

    def _warm_up(self) -> None:
        """Load what waits and what releases: a kernel that loads behind a waiting one hangs."""
        self._free(list(torch.zeros(2, PADS, self.size, dtype=torch.int32, device=self.device)), 0)
        torch.cuda.synchronize(self.device)
        self.put((self.rank + 1) % self.size, PADS - 1)
        self.wait((self.rank - 1) % self.size, PADS - 1)
        torch.cuda.synchronize(self.device)

    def slot(self, owner: int, writer: int, channel: int, parity: int) -> torch.Tensor:
        first = slot_index(owner, writer, channel, parity) * self.slot_bytes
        return self._inboxes[owner][first : first + self.slot_bytes]

    def begin(self, channel: int) -> None:
        issued = torch.cuda.current_stream(self.device).record_event()
        for stream in self._lanes[channel]:
            stream.wait_event(issued)

    def stream(self, channel: int, lane: int) -> contextlib.AbstractContextManager[None]:
        return torch.cuda.stream(self._lanes[channel][lane])

    def mark(self, channel: int) -> DeviceMark:
        return DeviceMark([stream.record_event() for stream in self._lanes[channel]], self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def put(self, peer: int, pad: int) -> None:
        self._handle.put_signal(peer, pad)

    def wait(self, peer: int, pad: int) -> None:
        self._handle.wait_signal(peer, pad)

    def release(self) -> None:
        # What arrives is garbage, and nobody gets it: `check` comes before any result.
        deadline = time.monotonic() + _RELEASE_S
        with torch.cuda.stream(self._rescue):
            while time.monotonic() < deadline and not self._idle():
                self._free(self._pads, self.rank)
                self._rescue.synchronize()

    def _free(self, pads: list[torch.Tensor], own: int) -> None:
        """Set every signal that this rank waits for, clear every one that it is about to set.

        Setting waits as well, until the reader has cleared what was set before; a dead one never
        does.
        """
        pads[own].fill_(1)
        for pad in (*pads[:own], *pads[own + 1 :]):
            pad[:, own].fill_(0)

    def _idle(self) -> bool:
        return all(stream.query() for lanes in self._lanes for stream in lanes)


class DeviceMark:
    """An event on every stream of a channel."""

    def __init__(self, events: Sequence[Any], device: torch.device):
        self._events = events
        self._device = device

    def join(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        for event in self._events:
            stream.wait_event(event)

    def done(self) -> bool:
        return all(event.query() for event in self._events)


class SymmetricMesh(ProcessMesh):
    """A process's view of ranks on one node whose GPU tensors move by symmetric memory.

    Messages (`exchange`, `permute`) go through mailboxes; collectives and tensors of the CPU stay
    with the process group.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        device: torch.device | str,
        store: dist.Store,
        *,
        board: Callable[[torch.device, dist.ProcessGroup, int], Board] = DeviceBoard,
        **kwargs,
    ):
        super().__init__(sizes, device, store, **kwargs)
        self._mail: Mailboxes | None = None
        if self.world_size > 1:
            made = board(self.device, self._group(None), slot_bytes_for(self.world_size))
            self._mail = Mailboxes(made)
            self.watch.enders.append(made.release)

    def _messages(self, sends, receives, what: Await, group):
        out, into, what = self._sorted(sends, receives, what)
        ours = all(t.device.type == self.device.type for _, t in (*out, *into))
        if self._mail is None or not ours:
            return super()._messages(sends, receives, what, group)
        self.check()
        assert what.channel < CHANNELS, f"channel {what.channel} of {CHANNELS}"
        mark = self._mail.exchange(out, into, what.channel)
        # Held until then: their memory may be given away once the caller waits no longer.
        return self._on_device(mark.join, mark.done, what, lambda: dict(receives), (out, into))


def share_devices() -> None:
    """Let ranks on one GPU rendezvous; torch refuses them otherwise."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"


def require_one_node(world_size: int, local_ranks: int) -> None:
    """Raise ConfigError when some ranks are elsewhere."""
    if local_ranks != world_size:
        raise ConfigError(
            f"carrier symmetric needs all ranks on one node, but {local_ranks} of {world_size} are "
            "here\n  to fix: carrier nccl, or auto"
        )
