"""What the port hands to a scheduler: its own timesteps, on the host; its state, as it was."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from stretto.diffusion.scheduler import HostTimes, SchedulerPort
from stretto.errors import UnsupportedPipeline


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


def test_a_grid_is_read_once_and_again_when_it_was_written_into():
    times = HostTimes()
    grid = torch.tensor([3.0, 2.0, 1.0])
    assert times.read(grid) is times.read(grid)
    grid.mul_(2)
    assert times.read(grid).tolist() == [6, 4, 2]
    assert float(times.on_host(grid[0], grid)) == 6
    assert times.read([5, 4]).tolist() == [5, 4]
    assert not len(times.read(None))


class Scheduler:
    """What the port asks of a scheduler, with a history."""

    def __init__(self):
        self.history = [torch.zeros(3), None]
        self.grid = torch.arange(3.0)
        self.count = 0

    def step(self, model_output, timestep, sample):
        raise AssertionError("no step is taken here")


def test_a_snapshot_outlives_writes_and_is_not_copied_where_there_are_none():
    scheduler = Scheduler()
    port = SchedulerPort(scheduler)
    history, grid = scheduler.history[0], scheduler.grid
    state = port.snapshot()
    for _ in range(2):
        scheduler.history[0].add_(1)
        scheduler.history.append(torch.ones(1))
        scheduler.count, scheduler.new = 5, True
        port.restore(state)
        assert scheduler.history[0].tolist() == [0, 0, 0]
        assert scheduler.history[1:] == [None]
        assert scheduler.count == 0
        assert not hasattr(scheduler, "new")
    assert scheduler.history[0] is not history
    assert scheduler.grid is grid


def test_a_later_snapshot_sees_what_was_written_since():
    scheduler = Scheduler()
    port = SchedulerPort(scheduler)
    first = port.snapshot()
    scheduler.grid.mul_(2)
    second = port.snapshot()
    scheduler.grid.zero_()
    port.restore(second)
    assert scheduler.grid.tolist() == [0, 2, 4]
    port.restore(first)
    assert scheduler.grid.tolist() == [0, 1, 2]


def test_inference_mode_keeps_no_count_of_writes_so_everything_is_copied():
    with torch.inference_mode():
        scheduler = Scheduler()
        port = SchedulerPort(scheduler)
        state = port.snapshot()
        scheduler.grid.zero_()
        port.restore(state)
        assert scheduler.grid.tolist() == [0, 1, 2]


def test_an_exported_state_is_plain_and_its_own():
    scheduler = Scheduler()
    port = SchedulerPort(scheduler)
    sent = port.exported()
    scheduler.grid.zero_()
    assert sent["grid"].tolist() == [0, 1, 2]
    port.restore(sent)
    assert scheduler.grid.tolist() == [0, 1, 2]


class _Passing:
    """A step that hands on whatever it does not know."""

    def step(self, model_output, timestep, sample, *args, generator=None, **others):
        return (sample, args, generator, others)


class _ByPlace:
    def step(self, model_output, timestep, sample, /):
        return (sample,)


def test_arguments_arrive_under_the_names_they_were_given():
    port, x = SchedulerPort(_Passing()), torch.ones(1)
    for _ in range(2):
        assert port.real(port.bind(x, 1, x, eta=3))[1:] == ((), None, {"eta": 3})
        assert port.real(port.bind(x, 1, sample=x, generator=4))[1:] == ((), 4, {})


def test_arguments_without_a_name_are_refused():
    x = torch.ones(1)
    with pytest.raises(UnsupportedPipeline, match="4 arguments by place, of which 3 have names"):
        SchedulerPort(_Passing()).bind(x, 1, x, 5)
    with pytest.raises(UnsupportedPipeline, match=r"has no \['model_output', 'sample'\]"):
        SchedulerPort(_ByPlace())


class _Indexed:
    """A scheduler that looks its first step up in its timesteps, and notes what they were."""

    def __init__(self):
        self.timesteps = torch.tensor([3.0, 2.0, 1.0])
        self.sigmas = None
        self.step_index = None
        self.seen = []

    def step(self, model_output, timestep, sample):
        self.seen.append(self.timesteps)
        if self.step_index is None:
            self.step_index = int((self.timesteps == timestep).nonzero())
        self.step_index += 1
        if float(model_output) < 0:
            raise ArithmeticError("negative")
        return (sample,)


def test_a_first_step_is_looked_up_in_the_hosts_copy_of_the_timesteps():
    scheduler = _Indexed()
    port, grid, x = SchedulerPort(scheduler), scheduler.timesteps, torch.ones(1)
    for timestep in grid:
        port.real(port.bind(x, timestep, x))
        assert scheduler.timesteps is grid
    assert scheduler.step_index == 3
    lent, *later = scheduler.seen
    assert lent is not grid
    assert torch.equal(lent, grid)
    assert all(seen is grid for seen in later)


def test_lent_timesteps_go_back_when_a_step_fails():
    scheduler = _Indexed()
    port, grid = SchedulerPort(scheduler), scheduler.timesteps
    with pytest.raises(ArithmeticError):
        port.real(port.bind(-torch.ones(1), grid[0], torch.ones(1)))
    assert scheduler.timesteps is grid


class _Regridding(_Indexed):
    def step(self, model_output, timestep, sample):
        found = super().step(model_output, timestep, sample)
        self.timesteps = self.timesteps[1:]
        return found


def test_timesteps_that_a_step_sets_itself_stay():
    scheduler = _Regridding()
    port, x = SchedulerPort(scheduler), torch.ones(1)
    port.real(port.bind(x, scheduler.timesteps[0], x))
    assert scheduler.timesteps.tolist() == [2, 1]


def test_a_timestep_on_a_device_is_compared_with_timesteps_there():
    scheduler = _Indexed()
    scheduler.step_index = None
    port, x = SchedulerPort(scheduler), torch.ones(1)
    with pytest.raises(RuntimeError):
        # A tensor without memory stands in for a GPU's; nothing can be looked up with it.
        port.real(port.bind(x, torch.empty((), device="meta"), x))
    assert scheduler.seen[0] is scheduler.timesteps


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_grids_are_the_host_s_whatever_the_default_device(kind):
    scheduler = kind()
    scheduler.set_timesteps(5)
    expected = SchedulerPort(scheduler).noise(1, 4)
    last = float(scheduler.timesteps[-1])
    with torch.device("meta"):
        port = SchedulerPort(scheduler)
        assert port.noise(1, 4) == expected
        assert port.position(last) == 4
        assert not len(HostTimes().read(None))
