"""Random states: taken over from rank 0, bit for bit, or refused."""

import pytest
import torch

from stretto import Plan
from stretto.diffusion.randomness import Randomness
from stretto.errors import RanksDisagree
from stretto.mesh.local import LocalWorld


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_rank_draws_what_rank_0_would(count):
    def drawn(mesh):
        generators = [torch.Generator().manual_seed(10 * mesh.world_rank + k) for k in range(count)]
        Randomness(generators, own_only=True).adopt(mesh)
        return [torch.randn(3, generator=generator).tolist() for generator in generators]

    first, *others = LocalWorld(Plan(step=3).sizes).run(drawn)
    assert first == [torch.randn(3, generator=g).tolist() for g in _seeded(count)]
    assert all(other == first for other in others)


def _seeded(count):
    return [torch.Generator().manual_seed(k) for k in range(count)]


def test_unlike_numbers_of_generators_are_refused():
    def adopt(mesh):
        Randomness([torch.Generator()] * (1 + mesh.world_rank), own_only=True).adopt(mesh)

    with pytest.raises(RanksDisagree, match="generators: rank 0 has cpu, rank 1 cpu,cpu"):
        LocalWorld(Plan(step=2).sizes).run(adopt)
