"""Who is named when waits end: by a record, by a deadline, on the host and on a device."""

import threading

import pytest
import torch
import torch.distributed as dist

from stretto.errors import MeshTimeout, RankLost
from stretto.mesh import abort
from stretto.mesh.abort import Await, Watch
from stretto.testing.ranks import run_ranks

COLUMN = Await("shift", "ring", "column")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(abort, "LOOK_S", 0.01)


@pytest.fixture
def watches():
    """Makes started watches of the ranks of one job, and stops them."""
    made, store = [], dist.HashStore()

    def make(rank, timeout_s=30.0, late=lambda what: None):
        watch = Watch(rank, store, lambda: timeout_s, late)
        watch.start()
        made.append(watch)
        return watch

    yield make
    for watch in made:
        watch.stop()


def seen(watch):
    """An event that is set once the watch ends this rank's waits."""
    event = threading.Event()
    watch.enders.append(event.set)
    return event


def test_one_ranks_reason_ends_the_waits_of_all(watches):
    first, second = watches(0), watches(1)
    ended = seen(second)
    first.abort("attention: bad shard")
    with second.waiting(COLUMN):
        assert ended.wait(10)
    with pytest.raises(RankLost, match=r"rank 1 cannot go on, lost: rank 0 .*attention: bad shard"):
        second.check("rank 1")


def test_the_first_reason_stands(watches):
    first, second = watches(0), watches(1)
    first.abort("the cause")
    second.abort("what followed")
    assert "the cause" in second.reason()
    assert "the cause" in first.reason()


def test_a_rank_at_work_leaves_the_store_alone(watches):
    first, second = watches(0), watches(1)
    first.abort("attention: bad shard")
    assert not seen(second).wait(0.1)
    second.check("rank 1")


def test_waits_end_once(watches):
    watch = watches(0)
    calls = []
    watch.enders.append(lambda: calls.append(1))
    watch.abort("one")
    watch.abort("two")
    assert calls == [1]


def test_work_of_a_device_beyond_its_deadline_is_told(watches):
    late, told = threading.Event(), []

    def call(what):
        told.append(what)
        late.set()

    watch = watches(0, timeout_s=0.05, late=call)
    watch.follow(lambda: True, Await("shift", "ring", "done in time"))
    watch.follow(lambda: False, COLUMN)
    assert late.wait(10)
    assert told[0] == COLUMN


def test_the_clock_of_device_work_runs_once_it_is_next(watches):
    """A host far ahead of its device queues more than a deadline's worth of work."""
    watch, now = watches(0, timeout_s=1000.0), [100.0]
    before_done = []
    watch.follow(lambda: bool(before_done), Await("shift", "ring", "first"))
    watch.follow(lambda: False, COLUMN)
    with watch._lock:
        watch._head_since = abort.time.monotonic() - now[0]
    assert watch._overdue(50.0) == Await("shift", "ring", "first")
    before_done.append(True)
    assert watch._overdue(50.0) is None


def test_a_rank_that_waits_says_for_what(watches):
    one, other = watches(0), watches(1)
    with one.waiting(COLUMN):
        while not other.waits(0):
            threading.Event().wait(0.01)
        assert other.waits(0) == "shift on ring for column"
    while other.waits(0):
        threading.Event().wait(0.01)


def sleeps_at(mesh, sleeper):
    """A chain of waits: 0 for 1 for the sleeper, who stays away until the others saw it."""
    mesh.barrier()
    here = mesh.rank("ring_in")
    try:
        if here == sleeper:
            mesh.record("computing step 7")
            mesh._store.wait(["over"])
            mesh.check()
        else:
            mesh.exchange({}, {here + 1: torch.empty(1)}, "ring_in", "column").wait()
    except MeshTimeout as error:
        mesh._store.set("over", "1")
        return str(error)


@pytest.mark.ranks
def test_the_rank_that_does_not_wait_is_named_at_the_deadline():
    *waiting, _ = run_ranks(sleeps_at, {"ring_in": 3}, 2, mesh_timeout_s=2)
    for rank, told in enumerate(waiting):
        assert f"rank {rank}: exchange on axis ring_in failed" in told
        assert "rank 2 (" in told
        assert "computing step 7" in told
