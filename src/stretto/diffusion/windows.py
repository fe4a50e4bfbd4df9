"""Which windows a generation walks: known from its noise grid, or grown from measured errors."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.errors import PlanMismatch
from stretto.plan.options import Adaptive, Listed, Steps
from stretto.search.resolve import resolve

#: Grids are float32 inside schedulers; two that differ by less are the same one.
_GRID_TOLERANCE = 1e-5


class Schedule:
    """Window sizes in order. Fixed beforehand, or grown from the errors measured so far."""

    def __init__(self, steps: Steps, noise: Sequence[float]):
        self._steps = steps
        self._num_steps = len(noise) - 1
        option = steps.windows
        self._tolerance = option.tolerance if isinstance(option, Adaptive) else None
        self.sizes: list[int] = [] if self.is_adaptive else list(_fixed(steps, noise))

    @property
    def is_adaptive(self) -> bool:
        return self._tolerance is not None

    def size_at(self, index: int, start: int, errors: Sequence[float]) -> int:
        """Size of window `index`, which starts at step `start`.

        `errors`: the last window's relative guess errors per position, as all ranks know them.
        """
        if self._tolerance is None:
            return self.sizes[index]
        self.sizes.append(self._next(index, start, errors, self._tolerance))
        return self.sizes[-1]

    def _next(self, index: int, start: int, errors: Sequence[float], tolerance: float) -> int:
        """Double while the error is under half the tolerance, +1 under it, else what was right."""
        left = self._num_steps - start
        if index == 0:
            return 1
        if not errors:
            return min(2, self._steps.degree, left)
        last, worst = len(errors), max(errors)
        if worst < tolerance / 2:
            wanted = 2 * last
        elif worst < tolerance:
            wanted = last + 1
        else:
            wanted = max(2, next(i for i, e in enumerate(errors) if e >= tolerance))
        return min(wanted, self._steps.degree, left)


def _fixed(steps: Steps, noise: Sequence[float]) -> tuple[int, ...]:
    """Sizes that are known beforehand. Raises PlanMismatch."""
    if isinstance(steps.windows, Listed):
        _check_grid(steps.windows.grid, noise, steps.degree)
    return resolve(steps, noise)


def _check_grid(grid: Sequence[float], noise: Sequence[float], degree: int) -> None:
    """Sizes made for one noise grid say nothing about another. Raises PlanMismatch."""
    if not grid:
        return
    here, there = len(noise) - 1, len(grid) - 1
    command = f"stretto generate calibrate FOLDER --degree {degree} --steps {here}"
    fix = f"to fix: calibrate anew, {command}"
    if here != there:
        raise PlanMismatch(
            f"steps: {here} in this generation, {there} in the calibration\n"
            "  why: windows are placed step by step\n"
            f"  {fix}, or generate with {there} steps"
        )
    worst = max(range(here + 1), key=lambda step: abs(noise[step] - grid[step]))
    if abs(noise[worst] - grid[worst]) > _GRID_TOLERANCE:
        raise PlanMismatch(
            f"noise grid: step {worst} of {here} starts at noise fraction {noise[worst]:.6f} in "
            f"this generation, at {grid[worst]:.6f} in the calibration\n"
            "  why: another shift, spacing or strength moves the steps that must be exact\n"
            f"  {fix}"
        )
