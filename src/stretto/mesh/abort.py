"""A rank that gives up ends its peers' waits: a record in the store, and a thread that looks.

Gloo cannot wait in slices (a wait that times out closes every connection of its group, measured
on torch 2.13), so what would be a slice's fault is the means: the watching thread lets a receive
of one byte time out, and every wait on that group ends at once. NCCL's communicators are aborted.
A rank that is killed leaves no record; those that wait for it look whether its process is there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from stretto.errors import MeshTimeout, RankLost
from stretto.mesh.alive import Living

#: Seconds between two looks at the abort record.
LOOK_S = 0.5
#: Seconds that the ends of all waits are given before the thread goes on.
END_S = 10.0
#: A message that nobody sends.
_NEVER_SENT = 2**20


@dataclass(frozen=True, slots=True)
class Await:
    """What a rank waits for: a verb on an axis for a phase of the work, and whom."""

    verb: str
    axis: str | None
    phase: str
    channel: int = 0
    peers: tuple[int, ...] = ()

    def of(self, peers: Sequence[int]) -> Await:
        return replace(self, peers=tuple(peers))

    def head(self, rank: int) -> str:
        where = "all ranks" if self.axis is None else f"axis {self.axis}"
        return f"rank {rank}: {self.verb} on {where} failed"

    def __str__(self) -> str:
        return f"{self.verb} on {self.axis or 'all ranks'} for {self.phase}"


class Watch:
    """The abort record of a job, and the thread that follows it and the deadlines of devices.

    The record is looked at only while this rank waits, so ranks at work leave the store alone.
    """

    def __init__(
        self,
        rank: int,
        store: dist.Store,
        timeout_s: Callable[[], float],
        late: Callable[[Await], None],
        ranks: Sequence[int] = (),
        device: torch.device | None = None,
    ):
        #: Called, each once, to end what this rank waits for.
        self.enders: list[Callable[[], None]] = []
        #: Ranks whose death is looked for also while this rank waits for nothing that is seen here.
        self.always: Sequence[int] = ()
        self._rank = rank
        self._device = device
        self._store = store
        self._timeout_s = timeout_s
        self._late = late
        self._living = Living(rank, ranks)
        # A client of its own: one that waits would keep the other from looking.
        self._looking = store.clone()  # pyrefly: ignore[missing-attribute]
        self._waiting: tuple[Await, float] | None = None
        self._on_device: deque[tuple[Callable[[], bool], Await]] = deque()
        self._head_since = 0.0
        self._lock = threading.Lock()
        self._told = False
        self._reason = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mesh-watch", daemon=True)

    def start(self) -> None:
        self._living.announce(self._store)
        self._thread.start()
        # A thread inside torch while the interpreter ends would end the process by a signal.
        atexit.register(self.stop)

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            with contextlib.suppress(RuntimeError):
                self._living.leave(self._looking)
        atexit.unregister(self.stop)

    @contextlib.contextmanager
    def waiting(self, what: Await) -> Iterator[None]:
        """Inside, this rank is known to wait, so that no peer takes it for the culprit."""
        self._waiting = (what, time.monotonic())
        try:
            yield
        finally:
            self._waiting = None

    def follow(self, done: Callable[[], bool], what: Await) -> None:
        """Watch work on a device, whose clock runs once all work before it is done."""
        with self._lock:
            self._drop_done()
            self._on_device.append((done, what))

    def abort(self, reason: str) -> None:
        """End every rank's waits with this reason, unless somebody else gave one before."""
        record = {"rank": self._rank, "time": time.time(), "reason": reason}
        self._reason = self._reason or _words(record)
        with contextlib.suppress(RuntimeError):
            first = self._store.compare_set("abort", "", json.dumps(record))
            self._reason = _words(json.loads(first))
        self._end_waits()

    def reason(self) -> str:
        """Who ended the mesh and why, "" while nobody did."""
        if not self._reason and self._store.check(["abort"]):
            self._reason = _words(json.loads(self._store.get("abort")))
        return self._reason

    def check(self, head: str) -> None:
        """Raise RankLost if this rank knows that somebody ended the mesh."""
        if self._reason:
            raise RankLost(f"{head} cannot go on, lost: {self._reason}")

    def waits(self, rank: int) -> str:
        """What a rank told that it is waiting for itself, "" if for nothing."""
        key = f"waiting/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def gather(self, key: object, members: Sequence[int], timeout_s: float) -> None:
        """Return once all members are about to make the same group, which itself cannot be ended.

        Raises RankLost, or MeshTimeout at the deadline.
        """
        name, deadline = f"group/{key}", time.monotonic() + timeout_s
        count = self._store.add(name, 1)
        pause_s = 0.0005
        while count < len(members):
            if self.reason():
                raise RankLost(f"rank {self._rank}: no group of {members}, lost: {self._reason}")
            if time.monotonic() > deadline:
                raise MeshTimeout(
                    f"rank {self._rank}: {count} of {len(members)} ranks came to make the group "
                    f"of {members} within {timeout_s:g} s"
                )
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, 0.05)
            count = self._store.add(name, 0)

    def _follow(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            # A new thread is on GPU 0, where asking for another GPU's events opens a context.
            torch.cuda.set_device(self._device)
        while not self._stop.wait(LOOK_S):
            late = self._overdue(self._timeout_s())
            if late:
                self._late(late)
            if self._reason:
                self._end_waits()
                return
            waits = self._long_wait()
            with contextlib.suppress(RuntimeError):
                # A store that is gone is no failure: rank 0 may have done its part and left.
                self._living.meet(self._looking)
                self._look(waits)
            self._look_for_dead(waits)

    def _look_for_dead(self, waits: Await | None) -> None:
        """End the mesh when a rank that is waited for has gone without a word."""
        needed = {*self.always, *(waits.peers if waits else ())}
        gone = self._living.gone(sorted(needed), self._looking)
        if gone and not self._reason:
            names = "; ".join(f"rank {rank}: {told}" for rank, told in gone.items())
            self.abort(f"{waits or 'at work'}, lost: {names}")

    def _look(self, waits: Await | None) -> None:
        """While this rank waits, publish for what, and see whether somebody ended the mesh."""
        if self._told and not waits:
            self._looking.set(f"waiting/{self._rank}", "")
            self._told = False
        if waits:
            self._looking.set(f"waiting/{self._rank}", str(waits))
            self._told = True
            if self._looking.check(["abort"]):
                self._reason = _words(json.loads(self._looking.get("abort")))
                self._end_waits()

    def _long_wait(self) -> Await | None:
        """What this rank has been waiting for since the last look, on the host or its device."""
        waiting = self._waiting
        if waiting and time.monotonic() - waiting[1] > LOOK_S:
            return waiting[0]
        return self._overdue(LOOK_S)

    def _overdue(self, limit_s: float) -> Await | None:
        """The oldest work on a device, if it has been so for longer than `limit_s`."""
        with self._lock:
            self._drop_done()
            late = self._on_device and time.monotonic() - self._head_since > limit_s
            return self._on_device[0][1] if late else None

    def _drop_done(self) -> None:
        if not self._on_device:
            self._head_since = time.monotonic()
        while self._on_device and self._on_device[0][0]():
            self._on_device.popleft()
            self._head_since = time.monotonic()

    def _end_waits(self) -> None:
        """All at once: freeing one NCCL communicator waits for the kernels of the others."""
        with self._lock:
            enders, self.enders = self.enders, []
        threads = [threading.Thread(target=end, name="mesh-end", daemon=True) for end in enders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(END_S)


def end_waits(group: dist.ProcessGroup) -> None:
    """End everything that waits on a group; it is of no use any more."""
    if _has(group, "cuda", "nccl"):
        group.abort()
    if _has(group, "cpu", "gloo"):
        # Once a receive times out, gloo closes the group's connections on both ends.
        peer = next(rank for rank in range(group.size()) if rank != group.rank())
        with contextlib.suppress(RuntimeError):
            byte = torch.zeros(1, dtype=torch.uint8)
            group.recv([byte], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))


def _has(group: dist.ProcessGroup, device: str, backend: str) -> bool:
    try:
        return group._get_backend(torch.device(device)).name() == backend
    except RuntimeError:
        return False


def _words(record: dict) -> str:
    ago = time.time() - record["time"]
    return f"rank {record['rank']} ({ago:.1f} s ago: {record['reason']})"
