"""Checks of values, at once on the CPU; the streams of a GPU are left to its benchmarks."""

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stretto.diffusion.deferred import Aside, Deferred, reading


def test_a_check_on_the_cpu_is_made_at_once():
    deferred, seen = Deferred(Aside()), []
    with deferred.aside(torch.ones(2)):
        deferred.check(torch.tensor(3.0), seen.append)
    assert seen == [torch.tensor(3.0)]
    deferred.close_window()
    deferred.finish()
    assert len(seen) == 1


class Stream:
    """Stands in for a stream: what it waited for, and the events it recorded."""

    def __init__(self, device):
        self.device, self.waited, self.events = device, [], 0

    def wait_stream(self, other):
        self.waited.append(other)

    def record_event(self):
        self.events += 1


class OnDevice:
    def __init__(self, device):
        self.device, self.streams = torch.device(device), []

    def record_stream(self, stream):
        self.streams.append(stream)


def streams(monkeypatch):
    """The current stream of each device, by device."""
    current = {torch.device(f"cuda:{i}"): Stream(torch.device(f"cuda:{i}")) for i in range(2)}
    monkeypatch.setattr(torch.cuda, "current_stream", current.__getitem__)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return current


def test_each_device_has_a_second_stream_and_all_are_joined(monkeypatch):
    current, aside = streams(monkeypatch), Aside()
    used = [OnDevice("cuda:0"), OnDevice("cuda:1"), OnDevice("cuda:0")]
    for tensor in used:
        with aside.work(tensor):
            pass
    first, second, again = (tensor.streams[0] for tensor in used)
    assert first is again
    assert [first.device.index, second.device.index] == [0, 1]
    assert first.waited == [current[first.device]] * 2
    aside.join()
    assert current[first.device].waited == [first]
    assert current[second.device].waited == [second]


def test_a_reading_waits_for_the_device_that_is_read(monkeypatch):
    """A thread's current device is another where virtual ranks use a second GPU."""
    current = streams(monkeypatch)
    with FakeTensorMode():
        reading([torch.empty(3, device="cuda:1"), torch.empty(2)])
    assert [stream.events for stream in current.values()] == [0, 1]


def test_a_reading_is_the_host_s_whatever_the_default_device():
    value = torch.ones(2)
    with torch.device("meta"):
        read = reading([value])
    assert read()[0].tolist() == [1, 1]
