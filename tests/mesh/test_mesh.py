"""Every carrier of the mesh gives the same answers, counts the same bytes and ends its waits."""

import os
import signal

import pytest
import torch

from stretto.errors import ConfigError, LaunchError, MeshTimeout, PlanMismatch, RankLost
from stretto.mesh.count import CountingMesh
from stretto.mesh.join import init_mesh
from stretto.mesh.local import LocalWorld
from stretto.testing.ranks import PRELOAD, Axes, preloaded, run_ranks

SIZES = {"step": 2, "cfg": 2}


def verbs(mesh):
    """One of each verb; plain values so that results can cross a process border."""
    mesh = CountingMesh(mesh)
    own = torch.full((3,), float(mesh.world_rank))
    gathered = [t.tolist() for t in mesh.all_gather(own, "step", "a").wait()]
    everyone = [t.tolist() for t in mesh.all_gather(own, None, "b").wait()]
    sent = mesh.broadcast(own.clone(), "cfg", 1, "c").wait().tolist()
    moved = mesh.permute(own, "step", {1: 0}, "d").wait()
    texts = mesh.gather_bytes(b"x" * mesh.world_rank, "cfg")
    told = mesh.broadcast_bytes(b"rank zero" if mesh.world_rank == 0 else b"")
    mesh.barrier()
    moved = None if moved is None else moved.tolist()
    lanes = {tuple(lane): n for lane, n in mesh.traffic if lane.phase in "abcd"}
    return gathered, everyone, sent, moved, texts, told, lanes


def expected(rank):
    step, cfg = divmod(rank, 2)
    lanes = {("a", "all_gather", "step"): 12, ("b", "all_gather", "world"): 36}
    if cfg == 1:
        lanes["c", "broadcast", "cfg"] = 12
    if step == 1:
        lanes["d", "permute", "step"] = 12
    return (
        [[float(cfg)] * 3, [float(cfg + 2)] * 3],
        [[float(r)] * 3 for r in range(4)],
        [float(step * 2 + 1)] * 3,
        [float(cfg + 2)] * 3 if step == 0 else None,
        [b"x" * (step * 2), b"x" * (step * 2 + 1)],
        b"rank zero",
        lanes,
    )


def test_virtual_ranks():
    assert LocalWorld(SIZES).run(verbs) == [expected(rank) for rank in range(4)]


@pytest.mark.ranks
def test_processes():
    assert run_ranks(verbs, SIZES) == [expected(rank) for rank in range(4)]


#: Around the lengths that one message holds: 256 and 16384 bytes with 8 for the length.
LENGTHS = (0, 1, 248, 249, 5000, 16376, 16377, 40000)


@pytest.mark.parametrize("length", LENGTHS)
def test_byte_strings_of_any_length_arrive(length):
    def text(rank, length):
        return bytes((rank + place) % 251 for place in range(length))

    def body(mesh):
        rank = mesh.rank("step")
        own = text(rank, length if rank else length // 2)
        return mesh.gather_bytes(own, "step"), mesh.broadcast_bytes(own, "step", 1)

    expected = [text(0, length // 2), text(1, length), text(2, length)]
    assert LocalWorld({"step": 3}).run(body) == [(expected, expected[1])] * 3


def test_a_collective_is_waited_for_once():
    pending = LocalWorld({}).mesh(0).all_gather(torch.ones(1), "step", "a")
    assert len(pending.wait()) == 1
    with pytest.raises(AssertionError, match="waited for once"):
        pending.wait()


@pytest.mark.parametrize(("axis", "sent"), [("step", 12), (None, 18)])
def test_a_sum_counts_what_a_ring_sends(axis, sent):
    """2 (P - 1) / P of the bytes: everyone's part to the sums, and the sums to everyone."""

    def body(mesh):
        mesh = CountingMesh(mesh)
        total = mesh.all_reduce(torch.ones(3), axis, "a").wait()
        assert total.tolist() == [float(mesh.size(axis))] * 3
        return mesh.traffic.total(), mesh.calls["all_reduce"]

    assert LocalWorld(SIZES).run(body) == [(sent, 1)] * 4


def held(mesh):
    return preloaded(), torch.get_num_threads()


@pytest.mark.ranks
def test_ranks_are_preloaded_and_single_threaded():
    """The standard library swallows a mistyped preload name, so ask a rank."""
    assert run_ranks(held, {"step": 2}) == [(list(PRELOAD), 1)] * 2


def raises(mesh):
    if mesh.world_rank == 1:
        raise ValueError("rank one gave up")
    mesh.barrier()


@pytest.mark.ranks
def test_a_raising_rank_ends_its_peers():
    with pytest.raises(LaunchError, match="rank 1 raised ValueError: rank one gave up"):
        run_ranks(raises, {"step": 2}, timeout_s=20)


def test_a_raising_virtual_rank_ends_its_peers():
    with pytest.raises(ValueError, match="rank one gave up"):
        LocalWorld({"step": 2}).run(raises)


def dies(mesh):
    mesh.record("at the start")
    mesh.barrier()
    if mesh.world_rank == 1:
        mesh.record("evaluating step 7")
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.record("waiting", waiting=True)
    try:
        mesh.barrier()
    except RankLost as error:
        return str(error)


@pytest.mark.ranks
def test_a_killed_rank_is_named():
    with pytest.raises(RankLost, match="rank 1 ended without a result, exit code -9"):
        run_ranks(dies, {"step": 2}, timeout_s=20)


def stalls(mesh):
    mesh.record("waiting", waiting=True)
    mesh.barrier()
    try:
        if mesh.world_rank == 1:
            # Longer than its peer, which is to run out of patience first.
            mesh.allow(3 * mesh.timeout_s)
            mesh.record("evaluating step 7")
            mesh.permute(torch.zeros(1), "step", {0: 1}, "never sent").wait()
        mesh.barrier()
    except MeshTimeout as error:
        return str(error)


@pytest.mark.ranks
def test_a_stalled_rank_is_named_with_what_it_did():
    first, _ = run_ranks(stalls, {"step": 2}, mesh_timeout_s=1)
    assert "rank 0: all_gather on all ranks failed, lost: rank 1" in first
    assert "evaluating step 7" in first


def test_virtual_ranks_time_out():
    def lonely(mesh):
        if mesh.world_rank == 0:
            mesh.barrier()

    with pytest.raises(MeshTimeout, match=r"did not finish within 0.2 s"):
        LocalWorld({"step": 2}, timeout_s=0.2).run(lonely)


def test_one_rank_needs_no_launcher():
    mesh = init_mesh(Axes({}))
    assert mesh.world_size == 1
    assert verbs_alone(mesh) == [[1.0], [1.0]]


def verbs_alone(mesh):
    one = torch.ones(1)
    (gathered,) = mesh.all_gather(one, "step", "a").wait()
    return [gathered.tolist(), mesh.broadcast(one, None, 0, "b").wait().tolist()]


def test_more_degrees_than_ranks():
    with pytest.raises(PlanMismatch, match="needs 4 ranks but this process was started alone"):
        init_mesh(Axes(SIZES))


@pytest.mark.parametrize(
    ("plan", "options", "error", "words"),
    [
        (None, {}, PlanMismatch, "is a NoneType"),
        ("ring4", {}, PlanMismatch, "is a str"),
        (Axes({}), {"timeout_s": 0}, ConfigError, "timeout_s=0"),
        (Axes({}), {"timeout_s": "9"}, ConfigError, "timeout_s='9'"),
        (Axes({}), {"timeout_s": float("nan")}, ConfigError, "timeout_s=nan"),
        (Axes({}), {"timeout_s": float("inf")}, ConfigError, "timeout_s=inf"),
        (Axes({}), {"device": "gpu"}, ConfigError, "device 'gpu'"),
        (Axes({}), {"device": "meta"}, ConfigError, "device meta: ranks work on cpu or cuda"),
        (Axes({}), {"device": "cuda:99"}, ConfigError, r"device cuda:99: this process sees \d+"),
    ],
)
def test_what_makes_no_mesh_is_named(plan, options, error, words):
    with pytest.raises(error, match=words):
        init_mesh(plan, **options)


def test_a_device_that_is_not_there(monkeypatch):
    """It would be found missing by the first tensor, long after."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device cuda: this process sees 0 CUDA devices"):
        init_mesh(Axes({}), device="cuda")
    with pytest.raises(ConfigError, match=r"device cpu:3: the processor is one device"):
        init_mesh(Axes({}), device="cpu:3")
    assert init_mesh(Axes({}), device="cpu:0").device.type == "cpu"


@pytest.mark.parametrize("ask", ["size", "rank", "peers"])
@pytest.mark.parametrize("axis", ["x", 3, ["step"]])
def test_an_axis_that_no_mesh_has(ask, axis):
    mesh = init_mesh(Axes({}))
    with pytest.raises(ConfigError, match=r"no mesh has it\n  to fix: step, .*, cp, or None"):
        getattr(mesh, ask)(axis)
    with pytest.raises(ConfigError, match="no mesh has it"):
        mesh.barrier(axis)
