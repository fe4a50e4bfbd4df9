"""Ranks as processes of one torch.distributed job, over gloo or NCCL.

Gloo carries point-to-point messages of every axis on the group of all ranks, kept apart by tags,
so that no stream of messages needs sockets of its own. NCCL knows no tags: each pair of axis and
channel gets a communicator when it is first used, which is why every rank of an axis takes part
in an `exchange` there, also with nothing to send.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from stretto import axes
from stretto.errors import MeshTimeout, RankLost
from stretto.mesh.abort import Await, Watch, end_waits
from stretto.mesh.mesh import WARMING_UP, Mesh, Pending

#: Channels of one axis; more would share tags with the next axis.
CHANNELS = 16
#: Seconds that torch's own deadlines lie beyond ours, which name what they waited for.
LEEWAY_S = 30.0


class ProcessMesh(Mesh):
    """One process's view of the ranks."""

    def __init__(
        self, sizes: Mapping[str, int], device: torch.device | str, store: dist.Store, **kwargs
    ):
        super().__init__(sizes, dist.get_rank(), device, **kwargs)
        self._store = store
        self._groups: dict[tuple, dist.ProcessGroup] = {}
        self._is_nccl = self.device.type == "cuda" and "nccl" in dist.get_backend_config()
        # Torch's own deadlines are set with a group and stay; ours end every wait before them.
        self._longest_s = WARMING_UP * self.timeout_s + LEEWAY_S
        whom = (self.peers(None), self.device)
        self.watch = Watch(self.world_rank, store, lambda: self.timeout_s, self._late, *whom)
        for axis in (None, *(a for a, size in self.sizes.items() if size > 1)):
            self._group(axis)
        self.watch.start()

    def all_gather(self, tensor, axis, phase):
        if self.size(axis) == 1:
            return Pending(lambda: [tensor])
        # A group knows its ranks in world order, which is not the order of a composite axis.
        parts = {rank: torch.empty_like(tensor) for rank in sorted(self.peers(axis))}
        result = [parts[rank] for rank in self.peers(axis)]
        what = Await("all_gather", axis, phase)
        return self._collective(dist.all_gather, what, lambda: result, list(parts.values()), tensor)

    def all_reduce(self, tensor, axis, phase):
        if self.size(axis) == 1:
            return Pending(lambda: tensor)
        what = Await("all_reduce", axis, phase)
        return self._collective(dist.all_reduce, what, lambda: tensor, tensor)

    def broadcast(self, tensor, axis, src, phase):
        if self.size(axis) == 1:
            return Pending(lambda: tensor)
        what, root = Await("broadcast", axis, phase), self.peers(axis)[src]
        return self._collective(dist.broadcast, what, lambda: tensor, tensor, src=root)

    def permute(self, tensor, axis, moves, phase):
        here = self.rank(axis)
        sends = {dst: tensor for src, dst in moves.items() if src == here}
        receives = {src: torch.empty_like(tensor) for src, dst in moves.items() if dst == here}
        moving = self._messages(sends, receives, Await("permute", axis, phase), self._group(axis))
        buffer = next(iter(receives.values()), None)

        def finish():
            moving.wait()
            return buffer

        return Pending(finish)

    def exchange(self, sends, receives, axis, phase, *, verb="exchange", channel=0):
        self.copy_own(sends, receives, axis)
        if self.size(axis) == 1:
            return Pending(lambda: dict(receives))
        assert channel < CHANNELS, f"channel {channel} of {CHANNELS}"
        return self._messages(sends, receives, Await(verb, axis, phase, channel), None)

    def record(self, stage, *, waiting=False):
        note = {"time": time.time(), "stage": stage, "waiting": waiting}
        self._store.set(f"record/{self.world_rank}", json.dumps(note))

    def abort(self, reason):
        self.watch.abort(reason)

    def check(self):
        self.watch.check(f"rank {self.world_rank}")

    def close(self):
        self.watch.stop()

    # ---- groups ------------------------------------------------------------------------------

    def _group(self, axis: str | None, channel: int | None = None) -> dist.ProcessGroup:
        """The group of this rank's axis, made when first needed; axes of all ranks share one.

        `channel` asks for a communicator of its own. Only members take part, all of them in the
        same order, since ranks do the same things in the same order.
        """
        members = tuple(sorted(self.peers(axis)))
        key = (members, None if channel is None else (axis, channel))
        if key not in self._groups:
            self.watch.gather(key, members, self.timeout_s)
            group = dist.new_group(
                list(members),
                timeout=timedelta(seconds=self._longest_s),
                use_local_synchronization=True,
            )
            assert isinstance(group, dist.ProcessGroup), "a member gets its group"
            if self._is_nccl and channel is not None:
                # All members connect now: later messages concern some of them only.
                dist.all_reduce(torch.zeros(1, device=self.device), group=group)
            self._groups[key] = group
            self.watch.enders.append(lambda: end_waits(group))
        return self._groups[key]

    # ---- messages ----------------------------------------------------------------------------

    def _messages(self, sends, receives, what: Await, group) -> Pending[dict[int, torch.Tensor]]:
        """Point-to-point messages between positions of an axis, other than to oneself.

        `group` is what NCCL uses between two ranks alone; None asks for a communicator of the
        axis and channel, for which all its ranks are here.
        """
        out, into, what = self._sorted(sends, receives, what)
        if not self._is_nccl:
            return self._gloo(out, into, what, receives)
        alone, group = group is not None, group or self._group(what.axis, what.channel)
        if any(not t.is_cuda for _, t in (*out, *into)):
            return self._gloo(out, into, what, receives)
        self.check()
        works = _one_by_one(out, into, group) if alone else _batched(out, into, group)
        return self._pending(works, what, lambda: dict(receives), on_device=True)

    def _sorted(self, sends, receives, what: Await):
        """Messages out and in by world rank, and whom this rank waits for."""
        here, peers = self.rank(what.axis), self.peers(what.axis)
        out = [(peers[p], t) for p, t in sends.items() if p != here and t.numel()]
        into = [(peers[p], t) for p, t in receives.items() if p != here and t.numel()]
        assert all(t.is_contiguous() for _, t in (*out, *into)), f"{what}: strided tensor"
        return out, into, what.of([rank for rank, _ in into] or [rank for rank, _ in out])

    def _gloo(self, out, into, what: Await, receives) -> Pending[dict[int, torch.Tensor]]:
        """Over gloo; tensors of a GPU through pinned copies, as gloo's send ends the process."""
        self.check()
        group, tag = self._group(None), self._tag(what)
        landing = [(rank, _host(t)) for rank, t in into]
        works = [dist.irecv(t, rank, group=group, tag=tag) for rank, t in landing]
        leaving = [(rank, _host_copy(t)) for rank, t in out]
        if any(t.is_cuda for _, t in out):
            torch.cuda.current_stream(self.device).synchronize()
        works += [dist.isend(t, rank, group=group, tag=tag) for rank, t in leaving]

        def deliver():
            for (_, host), (_, target) in zip(landing, into, strict=True):
                if host is not target:
                    target.copy_(host, non_blocking=True)
            leaving.clear()
            return dict(receives)

        return self._pending(works, what, deliver)

    def _tag(self, what: Await) -> int:
        """Streams of messages between the same two ranks are told apart by axis and channel."""
        names = (None, *axes.NAMES)
        verb = 0 if what.verb == "permute" else 1
        return 1 + (names.index(what.axis) * CHANNELS + what.channel) * 2 + verb

    # ---- waiting -----------------------------------------------------------------------------

    def _collective(self, call: Callable, what: Await, result: Callable, *args, **kwargs):
        """Begin a collective; `result()` is what its wait gives."""
        self.check()
        what = what.of([rank for rank in self.peers(what.axis) if rank != self.world_rank])
        work = call(*args, group=self._group(what.axis), async_op=True, **kwargs)
        on_device = self._is_nccl and any(_on_gpu(value) for value in args)
        return self._pending([work], what, result, on_device=on_device)

    def _pending(self, works, what: Await, result: Callable, *, on_device: bool = False) -> Pending:
        if not on_device:
            return Pending(lambda: self._finish(works, what, result))

        def join() -> None:
            for work in works:
                work.wait()

        return self._on_device(join, lambda: all(w.is_completed() for w in works), what, result)

    def _on_device(self, join, done, what: Await, result: Callable, held: object = None) -> Pending:
        """A collective whose wait orders streams and costs the host nothing; watched instead."""
        self.watch.follow(done, what)

        def finish():
            self.check()
            join()
            self.check()
            _ = held
            return result()

        return Pending(finish)

    def _finish(self, works, what: Await, result: Callable):
        deadline = time.monotonic() + self.timeout_s
        with self.watch.waiting(what):
            for work in works:
                left = max(0.001, deadline - time.monotonic())
                try:
                    work.wait(timedelta(seconds=left))
                except RuntimeError as error:
                    lost = self._lost(what, str(error))
                    self.abort(str(lost))
                    raise lost from None
        return result()

    def _late(self, what: Await) -> None:
        """The watching thread found work on a device beyond its deadline."""
        self.abort(str(self._lost(what, f"not done within {self.timeout_s:g} s")))

    def _lost(self, what: Await, error: str) -> MeshTimeout:
        """The error of a failed wait: who ended the mesh, or which peers were not waiting too."""
        head = what.head(self.world_rank)
        cause = error.strip().splitlines()[0][:200]
        detail = f"(phase {what.phase}; {cause})"
        try:
            told = self.watch.reason()
            if told:
                return RankLost(f"{head}, lost: {told}")
            lost = self._culprits(what)
        except RuntimeError:
            return RankLost(f"{head}, and so did the launcher's store {detail}")
        if not lost:
            limit = f"no answer within {self.timeout_s:g} s"
            return MeshTimeout(f"{head}: {limit} {detail}; raise timeout_s (--timeout)")
        names = "; ".join(_describe(rank, note) for rank, note in lost.items())
        return RankLost(f"{head}, lost: {names} {detail}")

    def _culprits(self, what: Await) -> dict[int, dict]:
        """Ranks with their last notes: those awaited that do not wait, else any that does not.

        When all wait: those awaited that wait for something else.
        """
        notes = {rank: self._note_of(rank) for rank in self.peers(None) if rank != self.world_rank}
        idle = {rank: note for rank, note in notes.items() if not note["waiting"]}
        awaited = [rank for rank in what.peers or self.peers(what.axis) if rank in notes]
        return (
            {rank: idle[rank] for rank in awaited if rank in idle}
            or idle
            or {r: notes[r] for r in awaited if notes[r]["waiting"] not in (True, str(what))}
        )

    def _note_of(self, rank: int) -> dict:
        """What a rank recorded last; `waiting` also says for what, where the rank told."""
        key = f"record/{rank}"
        note = {"time": None, "stage": "nothing yet", "waiting": False}
        if self._store.check([key]):
            note = json.loads(self._store.get(key))
        return note | {"waiting": note["waiting"] or self.watch.waits(rank)}


def _batched(out, into, group: dist.ProcessGroup) -> list[dist.Work]:
    ops = [dist.P2POp(dist.irecv, t, rank, group) for rank, t in into]
    ops += [dist.P2POp(dist.isend, t, rank, group) for rank, t in out]
    return dist.batch_isend_irecv(ops) if ops else []


def _one_by_one(out, into, group: dist.ProcessGroup) -> list[dist.Work]:
    works = [dist.irecv(t, rank, group=group) for rank, t in into]
    works += [dist.isend(t, rank, group=group) for rank, t in out]
    return [work for work in works if work is not None]


def _on_gpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return _host(tensor).copy_(tensor, non_blocking=True) if tensor.is_cuda else tensor


def _describe(rank: int, note: Mapping) -> str:
    words = "recorded nothing"
    if note["time"] is not None:
        words = f"{time.time() - note['time']:.1f} s ago: {note['stage']}"
    if isinstance(note["waiting"], str) and note["waiting"]:
        words += f"; waits for {note['waiting']}"
    return f"rank {rank} ({words})"
