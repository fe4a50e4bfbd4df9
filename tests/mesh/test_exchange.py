"""Messages of any size between positions of an axis: the same on threads and on processes."""

import pytest
import torch

from stretto.errors import RankLost
from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalWorld
from stretto.testing.ranks import run_ranks

#: A mesh whose order is not that of the sequence: the team axis lies between the rings.
SIZES = {"ring_out": 2, "team_out": 2, "ring_in": 2}


def letter(sender, reader, dtype=torch.float64):
    """As long as the reader's number, 0 included; tells who wrote it."""
    return torch.full((reader,), 10 * sender + reader, dtype=dtype)


def everyone_to_everyone(mesh, axis, dtype=torch.float64):
    """Uneven all-to-all on an axis in world ranks' letters; what arrived, and bytes sent."""
    mesh = CountingMesh(mesh)
    peers, here = mesh.peers(axis), mesh.world_rank
    sends = {p: letter(here, peer, dtype) for p, peer in enumerate(peers)}
    receives = {p: torch.empty(here, dtype=dtype) for p in range(len(peers))}
    arrived = mesh.exchange(sends, receives, axis, "mail").wait()
    return [arrived[p].tolist() for p in range(len(peers))], mesh.traffic.total(
        axis=axis or "world"
    )


def every_axis(mesh):
    found = [everyone_to_everyone(mesh, axis) for axis in ("ring", "team", "cp", None, "ulysses")]
    return [*found, everyone_to_everyone(mesh, "ring_in", torch.bfloat16)]


def expected(mesh, axis, item_bytes=8):
    peers, here = mesh.peers(axis), mesh.world_rank
    letters = [letter(peer, here).tolist() for peer in peers]
    return letters, item_bytes * (sum(peers) - here)


def check(results):
    world = LocalWorld(SIZES)
    for rank, found in enumerate(results):
        mesh = world.mesh(rank)
        wanted = [expected(mesh, axis) for axis in ("ring", "team", "cp", None, "ulysses")]
        assert found == [*wanted, expected(mesh, "ring_in", item_bytes=2)]


def test_virtual_ranks():
    check(LocalWorld(SIZES).run(every_axis))


@pytest.mark.ranks
def test_processes():
    check(run_ranks(every_axis, SIZES))


def overtaking(mesh):
    """Two channels, waited for in the other order; on each, messages keep their order."""
    here, other = mesh.rank("ring_out"), 1 - mesh.rank("ring_out")
    pending = {}
    for name, channel in (("a", 0), ("b", 1), ("c", 0)):
        sent = torch.tensor([float(ord(name) + here)])
        into = {other: torch.empty(1)}
        pending[name] = mesh.exchange({other: sent}, into, "ring_out", name, channel=channel)
    return {name: chr(int(pending[name].wait()[other]) - other) for name in "bac"}


def sums(mesh):
    own = torch.arange(5, dtype=torch.float64) + mesh.world_rank
    gathered = [int(t) for t in mesh.all_gather(torch.tensor(mesh.world_rank), "cp", "g").wait()]
    return gathered, mesh.all_reduce(own, "ring", "sum").wait().tolist(), overtaking(mesh)


def check_sums(results):
    world = LocalWorld(SIZES)
    for rank, (gathered, total, kept) in enumerate(results):
        peers = world.mesh(rank).peers("ring")
        assert gathered == world.mesh(rank).peers("cp") == [0, 2, 1, 3, 4, 6, 5, 7][:8]
        assert total == [sum(i + peer for peer in peers) for i in range(5)]
        assert kept == {"a": "a", "b": "b", "c": "c"}


def test_sums_and_channels_of_virtual_ranks():
    check_sums(LocalWorld(SIZES).run(sums))


@pytest.mark.ranks
def test_sums_and_channels_of_processes():
    check_sums(run_ranks(sums, SIZES))


def test_a_message_that_nobody_receives_is_a_mistake():
    def body(mesh):
        sends = {1: torch.ones(1)} if mesh.world_rank == 0 else {}
        mesh.exchange(sends, {}, "ring_in", "lost").wait()

    with pytest.raises(AssertionError, match="nobody received"):
        LocalWorld({"ring_in": 2}).run(body)


def test_ends_that_disagree_on_the_size_are_a_mistake():
    def body(mesh):
        other = 1 - mesh.world_rank
        mesh.exchange({other: torch.ones(2)}, {other: torch.empty(3)}, "ring_in", "uneven").wait()

    with pytest.raises(AssertionError, match=r"exchange on axis ring_in for uneven: sent"):
        LocalWorld({"ring_in": 2}).run(body)


def raises_inside(mesh):
    """The last rank raises inside a section; the others wait for somebody else."""
    with mesh.ending_peers("attention"):
        if mesh.world_rank == mesh.world_size - 1:
            raise ValueError("bad shard")
        other = 1 - mesh.rank("ring_in")
        mesh.exchange({}, {other: torch.empty(1)}, "ring_in", "column").wait()


def caught(mesh):
    try:
        raises_inside(mesh)
    except (ValueError, RankLost) as error:
        return str(error)


@pytest.mark.ranks
def test_a_raising_rank_ends_the_waits_of_all_others():
    """Ranks 0 and 1 wait for one another, so no closed connection would tell them."""
    *waiting, last = run_ranks(caught, {"ring_out": 2, "ring_in": 2}, mesh_timeout_s=40)
    assert last == "bad shard"
    for told in waiting:
        assert "rank 3" in told
        assert "attention: ValueError: bad shard" in told


def test_a_raising_virtual_rank_ends_the_waits_of_all_others():
    with pytest.raises(ValueError, match="bad shard"):
        LocalWorld({"ring_out": 2, "ring_in": 2}).run(raises_inside)
