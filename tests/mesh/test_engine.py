"""The door to torch's engines: a row of all ranks, whose waits end when the mesh does."""

import pytest
import torch
import torch.distributed as dist

from stretto.errors import LaunchError
from stretto.mesh.engine import torch_mesh
from stretto.mesh.local import LocalWorld
from stretto.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks


def row_of_ranks(mesh):
    over = torch_mesh(mesh)
    one = torch_mesh(LocalWorld({}).mesh(0))
    total = torch.ones(1)
    dist.all_reduce(total, group=over.get_group())
    return over.mesh.tolist(), over.get_local_rank(), one.mesh.tolist(), total.item()


def test_all_ranks_in_one_row_whatever_the_axes():
    found = run_ranks(row_of_ranks, {"fsdp": 2, "ring_in": 2})
    assert found == [([0, 1, 2, 3], rank, [rank], 4.0) for rank in range(4)]


def leave_a_peer_waiting(mesh):
    over = torch_mesh(mesh)
    with mesh.ending_peers("a test"):
        if mesh.world_rank == 1:
            raise KeyError("on purpose")
        dist.all_reduce(torch.ones(1), group=over.get_group())


def test_an_abort_ends_waits_of_torchs_engines():
    # Without it rank 0 would wait for longer than this test may last.
    with pytest.raises(LaunchError, match="on purpose"):
        run_ranks(leave_a_peer_waiting, {"fsdp": 2}, timeout_s=60, mesh_timeout_s=3600)
