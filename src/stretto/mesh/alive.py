"""Which ranks' processes are still there: the process table on one's own machine, else heartbeats.

A killed process closes its sockets, which ends gloo's waits at once. Nothing tells a GPU that waits
for a message of a process that is gone, over NCCL or symmetric memory. So a rank that waits looks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

#: Seconds between two signs of life of a rank that has peers on other machines.
BEAT_S = 2.0
#: Seconds without one after which such a peer counts as gone: many beats, for threads that starve.
STALE_S = 30.0


@dataclass(frozen=True, slots=True)
class Process:
    """A process that no later one can be taken for. `machine`: whose process table it is in."""

    machine: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> Process:
        return cls(_machine(), os.getpid(), (_state(os.getpid()) or ("", ""))[1])

    def is_gone(self) -> bool:
        """Ended, or waiting to be reaped; for a process of this machine."""
        found = _state(self.pid)
        return found is None or found[0] in "ZX" or found[1] != self.started


class Living:
    """What one rank knows of the others' processes. Store errors reach the caller."""

    def __init__(self, rank: int, ranks: Sequence[int]):
        self._rank = rank
        self._own = Process.own()
        self._unknown = [other for other in ranks if other != rank]
        self._known: dict[int, Process] = {}
        self._beats: dict[int, tuple[str, float]] = {}
        self._suspects: set[int] = set()
        self._last_beat = 0.0

    def announce(self, store: dist.Store) -> None:
        store.set(f"process/{self._rank}", json.dumps(asdict(self._own)))

    def leave(self, store: dist.Store) -> None:
        """This rank has done its part: from here on its end is no loss."""
        store.set(f"left/{self._rank}", "1")

    def meet(self, store: dist.Store) -> None:
        """Learn who the others are, until all are known, and give a sign of life where needed."""
        for rank in [r for r in self._unknown if store.check([f"process/{r}"])]:
            self._known[rank] = Process(**json.loads(store.get(f"process/{rank}")))
            self._unknown.remove(rank)
        now = time.monotonic()
        if self._far() and now - self._last_beat > BEAT_S:
            store.set(f"beat/{self._rank}", str(now))
            self._last_beat = now

    def gone(self, ranks: Sequence[int], store: dist.Store) -> dict[int, str]:
        """Of these ranks those whose process ended without leaving, with how that shows.

        Named at the second look: what a rank sent before it ended may be about to arrive.
        """
        found = {rank: told for rank in ranks if (told := self._missing(rank, store))}
        twice = {rank: told for rank, told in found.items() if rank in self._suspects}
        self._suspects = set(found)
        return twice

    def _missing(self, rank: int, store: dist.Store) -> str:
        known = self._known.get(rank)
        if known is None:
            return ""
        near = known.machine == self._own.machine
        told = _ended(known) if near else self._silent(rank, store)
        return "" if not told or _left(rank, store) else told

    def _silent(self, rank: int, store: dist.Store) -> str:
        """A peer on another machine without a sign of life, counted by this rank's clock."""
        with contextlib.suppress(RuntimeError):
            beat = store.get(f"beat/{rank}").decode() if store.check([f"beat/{rank}"]) else ""
            if self._beats.get(rank, ("", 0.0))[0] != beat:
                self._beats[rank] = (beat, time.monotonic())
        if rank not in self._beats:
            return ""
        silent_s = time.monotonic() - self._beats[rank][1]
        return f"no sign of life for {silent_s:.0f} s" if silent_s > STALE_S else ""

    def _far(self) -> bool:
        return any(known.machine != self._own.machine for known in self._known.values())


def _ended(known: Process) -> str:
    return f"its process {known.pid} is gone" if known.is_gone() else ""


def _left(rank: int, store: dist.Store) -> bool:
    """Whether a rank said that it was done. A store that is gone too knows of nobody."""
    with contextlib.suppress(RuntimeError):
        return store.check([f"left/{rank}"])
    return False


def _machine() -> str:
    """Host, boot, and the container's own process table, which others cannot look into."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    # Where there is no such table nobody shares one, and heartbeats decide.
    return " ".join(parts) if len(parts) == 3 else f"{parts[0]} {os.getpid()}"


def _state(pid: int) -> tuple[str, str] | None:
    """(state, when started) of a process, None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name before them is in brackets and may hold anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
