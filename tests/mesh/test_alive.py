"""Who counts as gone: a killed process, reaped or not, a silent peer elsewhere; not who left."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
import torch.distributed as dist

from stretto.errors import RankLost
from stretto.mesh import abort, alive
from stretto.mesh.abort import Await, Watch
from stretto.mesh.alive import Living, Process


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def process_of(child):
    return Process(Process.own().machine, child.pid, alive._state(child.pid)[1])


def ended(child):
    """Wait until the child has ended, without reaping it."""
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def test_a_process_is_gone_before_it_is_reaped_and_after(child):
    known = process_of(child)
    assert not known.is_gone()
    ended(child)
    assert known.is_gone()
    child.wait()
    assert known.is_gone()


def test_a_later_process_of_the_same_number_is_another():
    own = Process.own()
    assert not own.is_gone()
    assert Process(own.machine, own.pid, "1").is_gone()


def living(store, process):
    """Rank 0's view of rank 1, which is `process`."""
    store.set("process/1", json.dumps(asdict(process)))
    made = Living(0, (0, 1))
    made.meet(store)
    return made


def test_a_dead_peer_is_named_at_the_second_look(child):
    store = dist.HashStore()
    found = living(store, process_of(child))
    assert found.gone([1], store) == {}
    ended(child)
    assert found.gone([1], store) == {}
    assert found.gone([], store) == {}
    assert found.gone([1], store) == {}
    assert found.gone([1], store) == {1: f"its process {child.pid} is gone"}


def test_who_left_in_order_is_not_missed(child):
    store = dist.HashStore()
    found = living(store, process_of(child))
    Living(1, (0, 1)).leave(store)
    ended(child)
    assert found.gone([1], store) == {}
    assert found.gone([1], store) == {}


def test_a_peer_elsewhere_lives_as_long_as_its_heart_beats(monkeypatch):
    store, now = dist.HashStore(), [100.0]
    monkeypatch.setattr(alive.time, "monotonic", lambda: now[0])
    found = living(store, Process("another machine", 1, "1"))
    store.set("beat/1", "a")
    for silent_s, gone in ((0, False), (29, False), (2, True)):
        now[0] += silent_s
        found.gone([1], store)
        assert bool(found.gone([1], store)) is gone
    store.set("beat/1", "b")
    assert found.gone([1], store) == {}


def test_hearts_beat_only_where_ranks_are_apart():
    store = dist.HashStore()
    living(store, Process.own())
    assert not store.check(["beat/0"])
    living(store, Process("another machine", 1, "1"))
    assert store.check(["beat/0"])


def test_work_on_a_device_ends_when_its_peer_dies(child, monkeypatch):
    """As over NCCL: nothing but the look at the process table can end this wait."""
    monkeypatch.setattr(abort, "LOOK_S", 0.01)
    store, ending = dist.HashStore(), threading.Event()
    store.set("process/1", json.dumps(asdict(process_of(child))))
    watch = Watch(0, store, lambda: 1000.0, lambda what: None, (0, 1))
    watch.enders.append(ending.set)
    watch.start()
    try:
        watch.follow(lambda: False, Await("shift", "ring", "column").of([1]))
        assert not ending.wait(0.1)
        ended(child)
        assert ending.wait(10)
        with pytest.raises(RankLost, match=rf"lost: rank 1: its process {child.pid} is gone"):
            watch.check("rank 0")
    finally:
        watch.stop()


def test_an_engines_waits_end_too_though_the_mesh_does_not_see_them(child, monkeypatch):
    monkeypatch.setattr(abort, "LOOK_S", 0.01)
    store, ending = dist.HashStore(), threading.Event()
    store.set("process/1", json.dumps(asdict(process_of(child))))
    watch = Watch(0, store, lambda: 1000.0, lambda what: None, (0, 1))
    watch.always = [1]
    watch.enders.append(ending.set)
    watch.start()
    try:
        assert not ending.wait(0.1)
        ended(child)
        assert ending.wait(10)
    finally:
        watch.stop()
    assert "at work, lost: rank 1" in watch.reason()


def test_a_dead_rank_that_nobody_waits_for_ends_nothing(child, monkeypatch):
    monkeypatch.setattr(abort, "LOOK_S", 0.01)
    store, ending = dist.HashStore(), threading.Event()
    store.set("process/1", json.dumps(asdict(process_of(child))))
    watch = Watch(0, store, lambda: 1000.0, lambda what: None, (0, 1, 2))
    watch.enders.append(ending.set)
    watch.start()
    try:
        ended(child)
        watch.follow(lambda: False, Await("shift", "ring", "column").of([2]))
        assert not ending.wait(0.3)
    finally:
        watch.stop()
