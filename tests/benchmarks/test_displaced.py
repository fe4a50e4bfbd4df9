"""What kernels lose to messages: the order of a timed stretch, sizes, and what is written."""

import argparse

import displaced
import pytest
import torch

from stretto.cluster.model import MOST_DISPLACED


def beside(alone, both, num_bytes):
    return displaced.Beside("kernel", num_bytes, alone, message=9.0, beside=alone, both=both)


def test_the_part_is_what_all_kernels_lost_over_their_bytes_at_the_links_rate():
    found = [beside(2.0, 2.6, 100), beside(3.0, 3.3, 80)]
    assert displaced.part_displaced(found, 100.0) == pytest.approx(0.9 / 1.8)
    assert displaced.part_displaced(found, 200.0) == pytest.approx(0.9 / 0.9)


def test_noise_is_written_as_what_a_link_may_say():
    assert displaced.part_displaced([beside(2.0, 1.9, 100)], 100.0) == 0.0
    assert displaced.part_displaced([beside(2.0, 9.0, 100)], 100.0) == MOST_DISPLACED


@pytest.mark.parametrize(("seconds", "most", "right"), [(2.0, 1000, 100), (2.0, 64, 64), (0, 9, 1)])
def test_a_message_takes_half_of_its_kernel_and_never_nothing(seconds, most, right):
    assert displaced.message_bytes(seconds, 100.0, most) == right


class Log:
    """A job and a mesh of three ranks, of which this is the second, noting what they are asked."""

    device, options = torch.device("cpu"), argparse.Namespace()

    def __init__(self):
        self.done = []

    def barrier(self):
        self.done.append("barrier")

    def collect(self, mine):
        return [mine]

    def rank(self, axis):
        return 1

    def size(self, axis):
        return 3

    def exchange(self, sends, receives, axis, phase):
        sizes = {place: tensor.numel() for place, tensor in sends.items()}
        assert sizes.keys() == receives.keys() or set(receives) == {2}
        self.done.append(f"send {sizes}")
        return argparse.Namespace(wait=lambda: self.done.append(f"wait {sizes}"))


@pytest.fixture
def log(monkeypatch):
    """Its stamps are noted, too, and lie as many seconds apart as things happened in between."""
    log = Log()

    class Noted:
        def __init__(self, device):
            self.at = []

        def stamp(self):
            log.done.append("stamp")
            self.at.append(len(log.done))

        def milliseconds(self):
            pairs = zip(self.at[:-1], self.at[1:], strict=True)
            return [1e3 * (b - a - 1) for a, b in pairs]

    monkeypatch.setattr(displaced, "Stamps", Noted)
    return log


def stretch(log, num_bytes=8):
    return displaced._Stretch(log, log, lambda: log.done.append("kernel"), num_bytes)


#: The device is at work and has heard from both others before the first stamp.
READY = ["barrier", *["kernel"] * displaced.AHEAD, "send {0: 1, 2: 1}", "wait {0: 1, 2: 1}"]


def test_a_message_begins_before_its_kernel_and_is_waited_for_after_it(log):
    assert stretch(log).seconds(kernel=True, message=True) == [2, 1]
    both = ["stamp", "send {0: 8}", "kernel", "stamp", "wait {0: 8}", "stamp"]
    assert log.done == READY + both


def test_each_alone(log):
    assert stretch(log).seconds(kernel=True) == [1, 0]
    assert log.done == [*READY, "stamp", "kernel", "stamp", "stamp"]
    log.done.clear()
    assert stretch(log).seconds(message=True) == [1, 1]
    assert log.done == [*READY, "stamp", "send {0: 8}", "stamp", "wait {0: 8}", "stamp"]


def test_every_kernel_is_measured_with_a_message_of_its_own_size(log):
    works = {
        "short": lambda: log.done.append("kernel"),
        "long": lambda: log.done.extend(["kernel"] * 2),
    }
    found = displaced.measure(log, log, works, 100.0, turns=3)
    # Each thing between two stamps is a second, and a message gets half of its kernel's.
    assert [(each.kernel, each.num_bytes, each.alone) for each in found] == [
        ("short", 50, 1.0),
        ("long", 100, 2.0),
    ]
    # Sending is one thing more before the kernel's end, waiting one after it.
    assert [(each.beside, each.both, each.lost) for each in found] == [
        (2.0, 3.0, 2.0),
        (3.0, 4.0, 2.0),
    ]
    assert all(each.message == 2.0 for each in found)
