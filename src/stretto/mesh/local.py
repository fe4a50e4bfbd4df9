"""Virtual ranks: threads of one process that take turns, so that one device can play many ranks.

A rank runs only while it holds the turn and gives it up where it waits for others. Exactly one
computes at a time, so shared modules need no locks and results do not depend on timing.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

import torch

from stretto import axes
from stretto.errors import MeshTimeout, RankLost
from stretto.mesh.mesh import TIMEOUT_S, Mesh, Pending

#: Who failed when the user ended all ranks.
INTERRUPTED = -1


class LocalWorld:
    """The ranks of one process: hands out their meshes and runs a body on all of them."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = TIMEOUT_S,
    ):
        self.sizes = axes.ordered(sizes)
        self.device = device
        self.timeout_s = timeout_s
        self.turn = threading.Condition()
        self.slots: dict[tuple, dict[int, Any]] = {}
        self.readers: dict[tuple, int] = {}
        self.mail: dict[tuple, deque[torch.Tensor]] = defaultdict(deque)
        self.failed: dict[int, BaseException] = {}
        self.stages: dict[int, str] = {}

    @property
    def world_size(self) -> int:
        return axes.world_size(self.sizes)

    def mesh(self, rank: int) -> LocalMesh:
        return LocalMesh(self, rank)

    def run(self, body: Callable[[LocalMesh], object]) -> list:
        """`body(mesh)` on every virtual rank; results in rank order, or the first rank's error."""
        results: list = [None] * self.world_size
        ended: SimpleQueue[int] = SimpleQueue()

        def work(rank: int) -> None:
            with self.turn:
                try:
                    results[rank] = body(self.mesh(rank))
                except BaseException as error:  # noqa: BLE001 - raised again by run()
                    self.failed[rank] = error
                finally:
                    self.turn.notify_all()
                    ended.put(rank)

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"virtual-rank-{rank}", daemon=True)
            for rank in range(self.world_size)
        ]
        for thread in threads:
            thread.start()
        self._wait_for(ended)
        for thread in threads:
            thread.join()
        self._raise_first()
        unread = {key: len(letters) for key, letters in self.mail.items() if letters}
        assert not unread, f"messages that nobody received: {unread}"
        return results

    def _wait_for(self, ended: SimpleQueue[int]) -> None:
        """Until all ranks have ended; Ctrl-C ends them at their next step or wait.

        Left running, they would take the interpreter with them. Joining is no way to wait: threads
        whose join was interrupted count as ended (CPython issue 89437).
        """
        left = set(range(self.world_size))
        while left:
            try:
                left.discard(ended.get())
            except KeyboardInterrupt as interrupt:
                if INTERRUPTED in self.failed:
                    raise
                self.failed[INTERRUPTED] = interrupt

    def exchange(self, key: tuple, rank: int, value: Any, members: int) -> dict[int, Any]:
        """Put a value under a key, wait until all members did, and return them all."""
        slot = self.slots.setdefault(key, {})
        slot[rank] = value
        self.turn.notify_all()
        self.wait_until(lambda: len(slot) == members, f"{key[0]} on axis {key[1]}", rank)
        self.readers[key] = self.readers.get(key, 0) + 1
        if self.readers[key] == members:
            del self.slots[key], self.readers[key]
        return slot

    def wait_until(self, ready: Callable[[], bool], what: str, rank: int) -> None:
        """Give up the turn until `ready()`, a peer's failure or the deadline."""
        deadline = time.monotonic() + self.timeout_s
        while not ready():
            if self.failed:
                raise RankLost(f"rank {rank}: {what} cannot finish, lost: {self.losses()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise MeshTimeout(
                    f"rank {rank}: {what} did not finish within {self.timeout_s:g} s; "
                    f"last records: {self.stages}"
                )
            self.turn.wait(left)

    def losses(self) -> str:
        """The ranks that gave up, and why."""
        return "; ".join(f"rank {rank}: {error!r}" for rank, error in self.failed.items())

    def _raise_first(self) -> None:
        """Raise what went wrong first, not what followed from it."""
        if not self.failed:
            return
        causes = [e for e in self.failed.values() if not isinstance(e, RankLost)]
        raise (causes or list(self.failed.values()))[0]


class LocalMesh(Mesh):
    """One virtual rank's view of a `LocalWorld`."""

    def __init__(self, world: LocalWorld, rank: int):
        super().__init__(world.sizes, rank, world.device, world.timeout_s)
        self.world = world
        self._counts: dict[tuple, int] = {}

    def all_gather(self, tensor, axis, phase):
        if self.size(axis) == 1:
            return Pending(lambda: [tensor])
        key = self._key("all_gather", axis)
        sent = tensor.clone()

        def finish():
            slot = self.world.exchange(key, self.rank(axis), sent, self.size(axis))
            return [slot[position] for position in range(self.size(axis))]

        return Pending(finish)

    def all_reduce(self, tensor, axis, phase):
        gathered = self.all_gather(tensor, axis, phase)

        def finish():
            parts = gathered.wait()
            if len(parts) > 1:
                tensor.copy_(parts[0])
                for part in parts[1:]:
                    tensor.add_(part)
            return tensor

        return Pending(finish)

    def broadcast(self, tensor, axis, src, phase):
        if self.size(axis) == 1:
            return Pending(lambda: tensor)
        key = self._key("broadcast", axis)
        sent = tensor.clone() if self.rank(axis) == src else None

        def finish():
            slot = self.world.exchange(key, self.rank(axis), sent, self.size(axis))
            if sent is None:
                tensor.copy_(slot[src])
            return tensor

        return Pending(finish)

    def permute(self, tensor, axis, moves, phase) -> Pending[torch.Tensor | None]:
        here = self.rank(axis)
        for src, dst in moves.items():
            key = self._key(f"permute {src}-{dst}", axis)
            if here == src:
                assert tensor.is_contiguous(), f"permute on {axis} for {phase}: strided tensor"
                self.world.slots[key] = {src: tensor.clone()}
                self.world.turn.notify_all()
            elif here == dst:
                return Pending(lambda key=key, src=src: self._receive(key, src))
        return Pending(lambda: None)

    def exchange(self, sends, receives, axis, phase, *, verb="exchange", channel=0):
        self.copy_own(sends, receives, axis)
        here, peers = self.world_rank, self.peers(axis)
        for position, tensor in sends.items():
            if peers[position] != here and tensor.numel():
                assert tensor.is_contiguous(), f"{verb} on {axis} for {phase}: strided tensor"
                self.world.mail[here, peers[position], axis, channel].append(tensor.clone())
        self.world.turn.notify_all()
        what = f"{verb} on axis {axis} for {phase}"

        def finish():
            for position, buffer in receives.items():
                if peers[position] != here and buffer.numel():
                    self._collect((peers[position], here, axis, channel), buffer, what)
            return dict(receives)

        return Pending(finish)

    def allow(self, timeout_s):
        super().allow(timeout_s)
        self.world.timeout_s = timeout_s

    def abort(self, reason):
        self.world.failed.setdefault(self.world_rank, RankLost(reason))
        with self.world.turn:
            self.world.turn.notify_all()

    def check(self):
        if self.world.failed:
            raise RankLost(f"rank {self.world_rank} cannot go on, lost: {self.world.losses()}")

    def close(self):
        """Threads hold nothing."""

    def record(self, stage, *, waiting=False):
        self.world.stages[self.world_rank] = stage

    def _collect(self, key: tuple, buffer: torch.Tensor, what: str) -> None:
        letters = self.world.mail[key]
        self.world.wait_until(lambda: bool(letters), f"{what} from rank {key[0]}", self.world_rank)
        letter = letters.popleft()
        fits = letter.numel() == buffer.numel() and letter.dtype == buffer.dtype
        assert fits, f"{what}: sent {letter.shape} {letter.dtype}, got {buffer.shape}"
        assert buffer.is_contiguous(), f"{what}: strided buffer"
        buffer.copy_(letter.view(buffer.shape))

    def _receive(self, key: tuple, src: int) -> torch.Tensor:
        slots = self.world.slots
        self.world.wait_until(lambda: key in slots, f"{key[0]} on {key[1]}", self.world_rank)
        return slots.pop(key)[src]

    def _key(self, verb: str, axis: str | None) -> tuple:
        """Names the next collective of this verb in this group, the same on all its ranks."""
        group = (verb, axis, tuple(self.peers(axis)))
        self._counts[group] = self._counts.get(group, 0) + 1
        return (*group, self._counts[group])
