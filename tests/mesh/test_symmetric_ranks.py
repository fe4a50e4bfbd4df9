"""The symmetric carrier on real ranks: memory and signals in files that all processes map."""

import contextlib
import itertools
import queue
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stretto.errors import MeshTimeout, RankLost
from stretto.mesh.symmetric import CHANNELS, LANES, PADS, SymmetricMesh, slot_index
from stretto.testing.ranks import run_ranks
from tests.mesh.test_exchange import everyone_to_everyone, expected

SIZES = {"ring_out": 2, "ring_in": 2}
#: Small, so that letters are many pieces.
SLOT_BYTES = 8


class FileBoard:
    """`symmetric.Board` whose streams are threads of each process."""

    def __init__(self, folder, rank, ranks):
        self.rank, self.ranks, self.slot_bytes = rank, ranks, SLOT_BYTES
        slots = (ranks - 1) * CHANNELS * 2

        def mapped(name, shape):
            size = torch.Size(shape).numel()
            path = str(Path(folder) / name)
            return torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(shape)

        self.memory = mapped("memory", (ranks, slots, SLOT_BYTES))
        self.pads = mapped("pads", (ranks, PADS, ranks))
        self.work = [[queue.Queue() for _ in LANES] for _ in range(CHANNELS)]
        for lane in itertools.chain(*self.work):
            threading.Thread(target=self.run, args=(lane,), daemon=True).start()
        self.lane = None

    @staticmethod
    def run(lane):
        while True:
            lane.get()()
            lane.task_done()

    def slot(self, owner, writer, channel, parity):
        return self.memory[owner, slot_index(owner, writer, channel, parity)]

    def begin(self, channel):
        """A caller on the CPU has done all it issued."""

    @contextlib.contextmanager
    def stream(self, channel, lane):
        self.lane = self.work[channel][lane]
        yield

    def mark(self, channel):
        reached = [threading.Event() for _ in LANES]
        for lane, event in zip(self.work[channel], reached, strict=True):
            lane.put(event.set)
        return Reached(reached)

    def copy(self, target, source):
        self.lane.put(lambda: target.copy_(source))

    def put(self, peer, pad):
        self.lane.put(lambda: self.pads[peer, pad, self.rank].fill_(1))

    def wait(self, peer, pad):
        self.lane.put(lambda: self._wait(self.pads[self.rank, pad, peer]))

    @staticmethod
    def _wait(signal):
        while not signal.item():
            threading.Event().wait(0.0005)
        signal.zero_()

    def release(self):
        while any(lane.unfinished_tasks for lane in itertools.chain(*self.work)):
            self.pads[self.rank].fill_(1)


class Reached:
    def __init__(self, reached):
        self.reached = reached

    def join(self):
        for event in self.reached:
            event.wait()

    def done(self):
        return all(event.is_set() for event in self.reached)


def symmetric(mesh, folder, timeout_s=30.0):
    """A mesh of the same ranks over files."""
    mesh.barrier()
    store = dist.PrefixStore("symmetric", mesh._store)

    def board(device, group, slot_bytes):
        return FileBoard(folder, group.rank(), group.size())

    return SymmetricMesh(mesh.sizes, "cpu", store, timeout_s=timeout_s, board=board)


def every_axis(mesh, folder):
    mesh = symmetric(mesh, folder)
    found = [everyone_to_everyone(mesh, axis) for axis in ("ring", "cp", None)]
    moved = mesh.permute(torch.full((7,), float(mesh.world_rank)), "ring", {3: 1}, "move").wait()
    mesh.close()
    return [*found, everyone_to_everyone(mesh, "ring_in", torch.bfloat16)], moved


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as made:
        ranks = 4
        slots = (ranks - 1) * CHANNELS * 2
        (Path(made) / "memory").write_bytes(bytes(ranks * slots * SLOT_BYTES))
        (Path(made) / "pads").write_bytes(bytes(ranks * PADS * ranks))
        yield made


class Place:
    """A rank's place, for `expected`."""

    def __init__(self, rank):
        self.world_rank = rank

    def peers(self, axis):
        return [rank for rank in range(4) if axis != "ring_in" or rank // 2 == self.world_rank // 2]


@pytest.mark.ranks
def test_messages_of_many_pieces_between_processes(folder):
    for rank, (found, moved) in enumerate(run_ranks(every_axis, SIZES, folder)):
        wanted = [expected(Place(rank), axis) for axis in ("ring", "cp", None)]
        assert found == [*wanted, expected(Place(rank), "ring_in", item_bytes=2)]
        assert (moved is not None) == (rank == 1)
        assert rank != 1 or moved.tolist() == [3.0] * 7


def gives_up(mesh, folder):
    """Rank 3 raises while the others' devices wait for messages that nobody sends."""
    mesh = symmetric(mesh, folder)
    mesh.barrier()
    try:
        with mesh.ending_peers("attention"):
            if mesh.world_rank == 3:
                raise ValueError("bad shard")
            other = (mesh.world_rank + 1) % 3
            mesh.exchange({}, {other: torch.empty(5)}, "ring", "column").wait()
    except (ValueError, RankLost) as error:
        return str(error)


@pytest.mark.ranks
def test_a_raising_rank_ends_waits_of_devices(folder):
    *waiting, last = run_ranks(gives_up, SIZES, folder)
    assert last == "bad shard"
    assert all("rank 3" in told and "attention: ValueError: bad shard" in told for told in waiting)


def late(mesh, folder):
    """Nobody answers rank 0, whose device is beyond its deadline."""
    mesh = symmetric(mesh, folder, timeout_s=1.0)
    mesh.barrier()
    mesh.record("computing step 7")
    try:
        if mesh.world_rank == 0:
            mesh.exchange({}, {1: torch.empty(5)}, "ring", "column").wait()
        mesh._store.wait(["abort"])
        mesh.barrier()
    except MeshTimeout as error:
        return str(error)


@pytest.mark.ranks
def test_a_device_beyond_its_deadline_names_whom_it_awaits(folder):
    first, *others = run_ranks(late, SIZES, folder)
    assert "rank 0: exchange on axis ring failed, lost: rank 1" in first
    assert "computing step 7" in first
    assert all("rank 0" in told for told in others)
