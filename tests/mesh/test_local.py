"""Virtual ranks outside of `LocalWorld.run`: what a body would get around it."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest
import torch

from stretto.errors import RankLost
from stretto.mesh import local
from stretto.mesh.local import LocalWorld


def test_a_rank_may_give_up_outside_of_a_run():
    world = LocalWorld({"ring_in": 2}, timeout_s=20)
    world.mesh(1).abort("out of tokens")
    with pytest.raises(RankLost, match="out of tokens"):
        world.mesh(0).check()


def test_what_all_ranks_have_read_is_let_go():
    """A generation makes thousands of collectives; tensors of the first are not kept to its end."""

    def body(mesh):
        for _ in range(3):
            mesh.all_gather(torch.ones(2), "step", "window").wait()
            mesh.broadcast(torch.ones(2), None, 1, "exact").wait()
            if mesh.rank("step") != 1:
                mesh.permute(torch.ones(2), "step", {0: 2}, "guidance").wait()

    world = LocalWorld({"step": 3}, timeout_s=20)
    world.run(body)
    assert not world.slots
    assert not world.readers


class Told(SimpleQueue):
    """Ctrl-C comes while the caller waits for the ranks."""

    def get(self):
        if not self.sent:
            type(self).sent = True
            raise KeyboardInterrupt
        return super().get()

    sent = False


def test_an_interrupt_ends_virtual_ranks_before_it_goes_on(monkeypatch):
    """Left running, threads inside torch end the interpreter with an abort."""
    monkeypatch.setattr(local, "SimpleQueue", Told)
    world = LocalWorld({"step": 2})

    def body(mesh):
        if mesh.world_rank:
            mesh.all_gather(torch.ones(1), "step", "window").wait()
        while True:
            world.turn.wait(0.01)
            mesh.check()

    with pytest.raises(KeyboardInterrupt):
        world.run(body)
    assert not [t for t in threading.enumerate() if t.name.startswith("virtual-rank")]
    assert isinstance(world.failed[1], RankLost)
