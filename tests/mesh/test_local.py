"""Virtual ranks outside of `LocalWorld.run`: what a body would get around it."""

from __future__ import annotations

import pytest

from stretto.errors import RankLost
from stretto.mesh.local import LocalWorld


def test_a_rank_may_give_up_outside_of_a_run():
    world = LocalWorld({"ring_in": 2}, timeout_s=20)
    world.mesh(1).abort("out of tokens")
    with pytest.raises(RankLost, match="out of tokens"):
        world.mesh(0).check()
