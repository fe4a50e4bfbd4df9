"""The mailbox protocol of symmetric memory, on threads that run like devices: late and unordered.

Each virtual device works off a queue per channel in a thread of its own. Writing into a slot that
was not read, or a signal into a pad that is set, is an error there.
"""

import contextlib
import queue
import random
import threading

import pytest
import torch

from stretto.mesh import symmetric
from stretto.mesh.symmetric import (
    CHANNELS,
    LANES,
    PADS,
    Mailboxes,
    pad_of,
    slot_bytes_for,
    slot_index,
)

#: Seconds until a test that locks up is declared so.
PATIENCE_S = 20


class Node:
    """Memory and signals of all virtual devices, and what went wrong on any."""

    def __init__(self, ranks, slot_bytes):
        self.ranks = ranks
        self.slot_bytes = slot_bytes
        slots = (ranks - 1) * CHANNELS * 2
        self.inboxes = torch.full((ranks, slots, slot_bytes), 255, dtype=torch.uint8)
        self.signals = set()
        self.changed = threading.Condition()
        self.errors = []

    def fail(self, error):
        with self.changed:
            self.errors.append(error)
            self.changed.notify_all()


class Lane(threading.Thread):
    """A stream: runs what was issued, in order, some time later."""

    def __init__(self, node, seed):
        super().__init__(daemon=True)
        self.node = node
        self.chance = random.Random(seed)
        self.work = queue.Queue()
        self.start()

    def run(self):
        while (call := self.work.get()) is not None:
            for _ in range(self.chance.randrange(3)):
                threading.Event().wait(0)
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - told to the test
                self.node.fail(error)
                return


class ThreadBoard:
    """`symmetric.Board` of one virtual device. `one_queue`: all its streams are one."""

    def __init__(self, node, rank, seed=0, *, one_queue=False):
        self.node, self.rank, self.slot_bytes = node, rank, node.slot_bytes
        self.lanes = [
            [Lane(node, f"{seed} {rank} {channel} {lane}") for lane in LANES]
            for channel in range(CHANNELS)
        ]
        if one_queue:
            self.lanes = [[self.lanes[0][0]] * len(LANES)] * CHANNELS
        self.lane = None

    def slot(self, owner, writer, channel, parity):
        return self.node.inboxes[owner, slot_index(owner, writer, channel, parity)]

    def begin(self, channel):
        """A caller on the CPU has done all it issued."""

    @contextlib.contextmanager
    def stream(self, channel, lane):
        self.lane = self.lanes[channel][lane]
        yield

    def mark(self, channel):
        return ThreadMark(self.node, self.lanes[channel])

    def copy(self, target, source):
        self.lane.work.put(lambda: target.copy_(source))

    def put(self, peer, pad):
        self.lane.work.put(lambda: self._put((peer, self.rank, pad)))

    def wait(self, peer, pad):
        self.lane.work.put(lambda: self._wait((self.rank, peer, pad)))

    def _put(self, signal):
        with self.node.changed:
            assert signal not in self.node.signals, f"signal {signal} was not taken"
            self.node.signals.add(signal)
            self.node.changed.notify_all()

    def _wait(self, signal):
        with self.node.changed:
            came = self.node.changed.wait_for(
                lambda: signal in self.node.signals or self.node.errors, PATIENCE_S
            )
            assert came, f"signal {signal} never came"
            assert not self.node.errors, "a peer failed"
            self.node.signals.remove(signal)

    def end(self):
        for lanes in self.lanes:
            for lane in lanes:
                lane.work.put(None)


class ThreadMark:
    def __init__(self, node, lanes):
        self.node = node
        self.reached = [threading.Event() for _ in lanes]
        for lane, reached in zip(lanes, self.reached, strict=True):
            lane.work.put(reached.set)

    def join(self):
        for reached in self.reached:
            while not reached.wait(0.01):
                assert not self.node.errors, self.node.errors

    def done(self):
        return all(reached.is_set() for reached in self.reached)


def letter(sender, reader, size, number):
    made = torch.Generator().manual_seed(1000 * number + 10 * sender + reader)
    return torch.randint(0, 255, (size,), dtype=torch.uint8, generator=made)


def mail(node, rounds, mailboxes=Mailboxes, *, one_queue=False):
    """All ranks carry out `rounds` of (channel, sizes by (sender, reader)), and check the mail."""
    boards = [ThreadBoard(node, rank, one_queue=one_queue) for rank in range(node.ranks)]
    boxes = [mailboxes(board) for board in boards]
    waiting = []
    for number, (channel, sizes) in enumerate(rounds):
        for rank, box in enumerate(boxes):
            out = [(r, letter(s, r, n, number)) for (s, r), n in sizes.items() if s == rank and n]
            into = [
                (s, torch.zeros(n, dtype=torch.uint8))
                for (s, r), n in sizes.items()
                if r == rank and n
            ]
            waiting.append((number, rank, into, box.exchange(out, into, channel)))
    for number, rank, into, mark in waiting:
        mark.join()
        for sender, tensor in into:
            wanted = letter(sender, rank, tensor.numel(), number)
            assert torch.equal(tensor, wanted), f"round {number}, {sender} to {rank}"
    for board in boards:
        board.end()
    assert not node.errors
    return boxes


def random_rounds(ranks, count, seed, largest):
    chance = random.Random(seed)
    pairs = [(s, r) for s in range(ranks) for r in range(ranks) if s != r]
    return [
        (
            chance.randrange(CHANNELS),
            {
                pair: chance.choice((0, 1, largest // 3, largest))
                for pair in pairs
                if chance.random() < 0.6
            },
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_uneven_messages_of_many_pieces_arrive(ranks):
    """Up to five pieces each, both ways at once, many rounds ahead of the slowest device."""
    mail(Node(ranks, slot_bytes=8), random_rounds(ranks, 25, seed=ranks, largest=37))


@pytest.mark.parametrize("ranks", [2, 4])
def test_devices_that_run_all_streams_as_one_queue(ranks):
    rounds = random_rounds(ranks, 25, seed=ranks, largest=37)
    mail(Node(ranks, slot_bytes=8), rounds, one_queue=True)


def test_a_ring_far_ahead_of_its_devices():
    hop = {(rank, (rank - 1) % 4): 16 for rank in range(4)}
    mail(Node(4, slot_bytes=16), [(0, hop)] * 30)


def test_other_dtypes_and_shapes_are_bytes():
    node = Node(2, slot_bytes=8)
    boards = [ThreadBoard(node, rank) for rank in range(2)]
    sent = torch.randn(3, 5).to(torch.bfloat16)
    got = torch.zeros(3, 5, dtype=torch.bfloat16)
    Mailboxes(boards[0]).exchange([(1, sent)], [], 1)
    Mailboxes(boards[1]).exchange([], [(0, got)], 1).join()
    assert torch.equal(sent, got)


class Hasty(Mailboxes):
    """Does not wait until a slot was read."""

    def _send(self, reader, piece, channel):
        before, self._sent[reader, channel] = self._sent[reader, channel], 0
        self._sent[reader, channel] = before % 2
        super()._send(reader, piece, channel)
        self._sent[reader, channel] = before + 1


def test_a_writer_that_does_not_wait_is_caught():
    with pytest.raises(AssertionError):
        mail(Node(2, slot_bytes=4), [(0, {(0, 1): 40})] * 5, Hasty)


def test_pads_and_slots_are_distinct():
    pads = {pad_of(c, p, k) for c in range(CHANNELS) for p in range(2) for k in range(2)}
    assert pads == set(range(PADS - 1))
    for owner in range(4):
        slots = {
            slot_index(owner, writer, channel, parity)
            for writer in range(4)
            for channel in range(CHANNELS)
            for parity in range(2)
            if writer != owner
        }
        assert slots == set(range(3 * CHANNELS * 2))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_slots_fill_the_inbox_by_powers_of_two(ranks):
    size = slot_bytes_for(ranks)
    assert size & (size - 1) == 0
    total = max(1, ranks - 1) * CHANNELS * 2 * size
    assert symmetric.INBOX_BYTES / 2 < total <= symmetric.INBOX_BYTES
