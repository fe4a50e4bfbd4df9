"""The door to torch's own engines: a part of the mesh as a DeviceMesh.

Nothing else imports DeviceMesh, whose views and names differ between torch 2.11 and 2.15.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from stretto.mesh.mesh import Mesh

#: Channel of the group that engines use: their collectives overlap those of the mesh.
_CHANNEL = 15


def torch_mesh(mesh: Mesh) -> DeviceMesh:
    """All ranks of the mesh in one row, in rank order, on a group of their own.

    `Mesh.abort` ends waits on it like all others. For a mesh of one rank there must be a default
    group, this rank's own or that of a larger job; of the latter every rank calls this, equally
    often, because torch names groups by how many a process has (2.13).
    """
    from stretto.mesh.process import ProcessMesh

    if isinstance(mesh, ProcessMesh) and mesh.world_size > 1:
        group = mesh._group(None, _CHANNEL)
        # An engine's waits are not the mesh's own, so nobody would see them when a rank dies.
        mesh.watch.always = [rank for rank in mesh.peers(None) if rank != mesh.world_rank]
    elif dist.get_world_size() == mesh.world_size:
        group = dist.group.WORLD
    else:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "a member gets its group"
    return DeviceMesh.from_group(group, mesh.device.type)
