"""Ranks come back with results, or with the error that explains best; none is left behind."""

import contextlib
import os
import signal
import time
from multiprocessing import forkserver

import pytest
import torch

from stretto.errors import LaunchError, PlanMismatch, RankLost
from stretto.mesh.join import init_mesh
from stretto.mesh.launch import GRACE_S, launch, prepare
from stretto.testing.ranks import Axes

TWO = Axes({"step": 2})


def total(tell, number):
    mesh = init_mesh(TWO, device="cpu", timeout_s=30)
    tell("adding", done=1, total=2)
    parts = mesh.all_gather(torch.tensor([float(number + mesh.world_rank)]), None, "sum").wait()
    return mesh.world_rank, float(sum(parts)), torch.get_num_threads(), os.getpid()


def alone(tell, number):
    tell("alone")
    return number, os.getpid()


def hears(tell):
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def refuses(tell, kind, message):
    mesh = init_mesh(TWO, device="cpu", timeout_s=30)
    if mesh.world_rank == 1:
        raise kind(message)
    mesh.barrier()


def dies(tell):
    mesh = init_mesh(TWO, device="cpu", timeout_s=30)
    tell("about to end", pid=os.getpid())
    mesh.record("window 3: evaluating step 7")
    mesh.barrier()
    if mesh.world_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.record("waiting", waiting=True)
    mesh.barrier()


def stalls_while_a_peer_waits(tell):
    mesh = init_mesh(TWO, device="cpu", timeout_s=2)
    tell("in window 5", pid=os.getpid())
    if mesh.world_rank == 1:
        mesh.record("window 5: evaluating step 11")
        time.sleep(600)
    mesh.record("window 5: waiting", waiting=True)
    mesh.barrier()


def stalls_everywhere(tell):
    tell("loading for ever")
    time.sleep(600)


def stops_the_server(tell):
    tell("stopping the server")
    os.kill(os.getppid(), signal.SIGSTOP)


def run(entry, *args, notes=None, timeout_s=60.0, ranks=2):
    collected = [] if notes is None else notes
    return launch(
        entry,
        *args,
        ranks=ranks,
        timeout_s=timeout_s,
        on_note=lambda rank, note: collected.append((rank, note)),
    )


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def assert_all_ended(notes):
    """No process that gave a note is left, not even as a zombie of the fork server."""
    pids = {note["pid"] for _, note in notes}
    assert pids
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        os.sched_yield()
    assert not any(map(is_alive, pids))


def test_one_rank_runs_here():
    notes = []
    assert run(alone, 5, notes=notes, ranks=1) == [(5, os.getpid())]
    assert notes == [(0, {"stage": "alone"})]


def test_errors_of_one_rank_pass_unchanged():
    def fails(tell):
        raise PlanMismatch("as it was")

    with pytest.raises(PlanMismatch, match=r"^as it was$"):
        run(fails, ranks=1)


@pytest.mark.ranks
def test_results_in_rank_order_and_notes_arrive():
    notes = []
    results = run(total, 10, notes=notes)
    assert [result[:3] for result in results] == [(0, 21.0, 1), (1, 21.0, 1)]
    assert len({pid for *_, pid in results} | {os.getpid()}) == 3
    last = {rank: note["stage"] for rank, note in notes}
    assert last == {0: "done", 1: "done"}
    assert_all_ended(notes)


@pytest.mark.ranks
def test_a_rank_hears_interrupts_that_its_server_does_not():
    assert run(hears) == [True, True]


@pytest.mark.ranks
def test_an_error_of_the_tree_keeps_its_type_and_message():
    notes = []
    with pytest.raises(PlanMismatch, match="17 is not 18") as caught:
        run(refuses, PlanMismatch, "17 is not 18", notes=notes)
    assert str(caught.value) == "17 is not 18"
    assert "in rank 1" in caught.value.__notes__[0]
    assert "in refuses" in caught.value.__notes__[0]
    assert_all_ended(notes)


@pytest.mark.ranks
def test_another_error_is_a_launch_error_with_the_traceback():
    with pytest.raises(LaunchError, match=r"rank 1 raised ZeroDivisionError: none(.|\n)*refuses"):
        run(refuses, ZeroDivisionError, "none")


@pytest.mark.ranks
def test_a_killed_rank_is_named_with_what_it_recorded():
    notes = []
    with pytest.raises(RankLost, match=r"rank 1 .*window 3: evaluating step 7"):
        run(dies, notes=notes)
    assert_all_ended(notes)


@pytest.mark.ranks
def test_a_stalling_rank_is_named_by_the_one_that_waits():
    notes = []
    with pytest.raises(RankLost, match=r"rank 1 .*window 5: evaluating step 11"):
        run(stalls_while_a_peer_waits, notes=notes)
    assert_all_ended(notes)


@pytest.mark.ranks
def test_silence_everywhere_ends_within_the_timeout():
    notes = []
    with pytest.raises(RankLost, match=rf"within {2 + GRACE_S:g} s: rank 0 .*loading for ever"):
        run(stalls_everywhere, notes=notes, timeout_s=2.0)
    assert_all_ended(notes)


@pytest.mark.ranks
def test_a_server_that_is_stopped_before_it_begins_ranks_is_named_in_time():
    prepare()
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    words = (
        rf"within {1 + GRACE_S:g} s: rank 0 .recorded nothing(.|\n)*process {server}, the server"
    )
    with pytest.raises(RankLost, match=words):
        run(hears, timeout_s=1.0)
    assert run(hears) == [True, True]


@pytest.mark.ranks
def test_a_server_that_is_stopped_under_its_ranks_is_named_in_time():
    notes = []
    with pytest.raises(RankLost, match=r"process \d+, the server that ranks are forked from"):
        run(stops_the_server, notes=notes, timeout_s=1.0)
    assert_all_ended(notes)
    assert run(hears) == [True, True]
