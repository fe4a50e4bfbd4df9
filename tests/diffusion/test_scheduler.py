"""What the port hands to a scheduler: its own timesteps, on the host."""

import torch

from stretto.diffusion.scheduler import HostTimes


def test_host_times_know_items_of_the_grid_by_their_memory():
    times = HostTimes()
    grid = torch.tensor([999.0, 500.0, 20.0])
    cut = grid[1:]
    assert [float(times.on_host(item, grid)) for item in cut] == [500.0, 20.0]
    # After a restore the scheduler holds a copy; the pipeline still walks the first grid.
    assert times.on_host(grid[2], grid.clone()).item() == 20.0
    own = torch.tensor(500.0)
    assert times.on_host(own, grid) is own
    other = grid.to(torch.float64)
    item = other[0]
    assert times.on_host(item, grid) is item


def test_host_times_follow_a_new_grid():
    times = HostTimes()
    first, second = torch.tensor([3, 2, 1]), torch.tensor([30, 20, 10])
    assert int(times.on_host(first[0], first)) == 3
    assert int(times.on_host(second[1], second)) == 20
