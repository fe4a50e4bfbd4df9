"""Adaptive windows: how they grow and shrink with the errors that were measured."""

import pytest

from stretto.diffusion.windows import Schedule
from stretto.plan.options import Adaptive, Steps

TOLERANCE = 0.1
#: Errors of a window's positions, and the size of the next window, of at most 8 steps.
NEXT = [
    ((0.0, 0.049), 4),  # under half the tolerance: doubled
    ((0.0, 0.05), 3),  # under the tolerance: one more
    ((0.0, 0.099, 0.02), 4),  # the worst position counts, wherever it stands
    ((0.0, 0.02, 0.03, 0.1), 3),  # no longer within it: what was right
    ((0.0, 0.2, 0.3, 0.4), 2),  # never below two, or nothing would be measured again
    ((0.0,) * 5, 8),  # as many as there are ranks
]


def schedule(num_steps):
    noise = [1 - step / num_steps for step in range(num_steps + 1)]
    return Schedule(Steps(degree=8, windows=Adaptive(tolerance=TOLERANCE)), noise)


@pytest.mark.parametrize(("errors", "size"), NEXT)
def test_the_next_window(errors, size):
    assert schedule(50).size_at(3, 10, errors) == size


def test_the_first_windows_are_one_and_two():
    found = schedule(50)
    assert [found.size_at(0, 0, ()), found.size_at(1, 1, ())] == [1, 2]
    assert found.sizes == [1, 2]


@pytest.mark.parametrize(("errors", "left"), [((), 1), ((0.0, 0.0), 3), ((0.0, 0.06), 2)])
def test_no_window_goes_beyond_the_last_step(errors, left):
    assert schedule(20).size_at(5, 20 - left, errors) == left
