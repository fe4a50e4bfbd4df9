"""Window plans of step-parallel denoising: which steps are computed together, and at what depth.

N steps are cut into windows, a tuple of sizes that sum to N. A window of size 1 is an exact step.
In a window of size W > 1 step rank r < W evaluates the denoiser at position r, on latents that it
reached by guessing the r predictions before it. Nothing can be guessed before the first
prediction exists, so the first window is always 1. Pure arithmetic: no torch, no ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from stretto.errors import PlanMismatch

# Power of `distrust`: 4 left the first window of the shipped models at 7 or 8 steps, 8 brings it
# to 4 or 6.
_DISTRUST = 8
# Below these fractions of noise and of signal the gains 1 / s and 1 / (1 - s)^2 are not believed.
_LEAST = 1e-3

StepCost = Callable[[int, int], float]
WindowCost = Callable[[int], Fraction | int]


def published(num_steps: int, degree: int, warmup: int) -> tuple[int, ...]:
    """Windows of the published schedule: `warmup` exact steps, full windows, the remainder last.

    Raises PlanMismatch unless 1 <= degree <= num_steps and 1 <= warmup <= num_steps.
    Source: ParaStep, NeurIPS 2025 (arXiv 2505.14741).
    """
    return fixed(num_steps, degree, warmup, 0)


def fixed(num_steps: int, degree: int, warmup: int, cooldown: int) -> tuple[int, ...]:
    """Exact steps at both ends and full windows between, a short one before the cooldown if left.

    Raises PlanMismatch unless 1 <= degree <= num_steps, warmup >= 1, cooldown >= 0 and
    warmup + cooldown <= num_steps.
    """
    _check_degree(num_steps, degree)
    if warmup < 1 or cooldown < 0 or warmup + cooldown > num_steps:
        raise PlanMismatch(
            f"warmup {warmup} + cooldown {cooldown} does not fit {num_steps} steps\n"
            "  why: the first step is always exact and both ends lie inside the run\n"
            f"  to fix: warmup >= 1, cooldown >= 0, together at most {num_steps}"
        )
    full, rest = divmod(num_steps - warmup - cooldown, degree)
    middle = (degree,) * full + ((rest,) if rest else ())
    return (1,) * warmup + middle + (1,) * cooldown


def default_depth(num_steps: int, degree: int) -> int:
    """Depth of the published schedule with warmup min(5, max(1, N // 4)), for equal-depth tables.

    Raises PlanMismatch unless 1 <= degree <= num_steps.
    """
    return len(published(num_steps, degree, min(5, max(1, num_steps // 4))))


def least_depth(num_steps: int, degree: int) -> int:
    """Smallest number of windows that covers N steps: 1 + ceil((N - 1) / degree).

    Raises PlanMismatch unless 1 <= degree <= num_steps.
    """
    _check_degree(num_steps, degree)
    return 1 + math.ceil((num_steps - 1) / degree)


def tail_cost(noise: Sequence[float], start: int, size: int) -> float:
    """Relative squared error that a window of `size` steps at `start` is expected to add.

    noise holds the noise fractions s_0..s_N in [0, 1] of the N steps and of the final latents.
    Guess error (second order in s) times step, weighed by `gain`, summed over the guessed
    positions and squared; 0 for an exact step. start >= 1 where size > 1.
    Source: design brief of step parallelism, section 4.2, but for the gain.
    """
    if size == 1:
        return 0.0
    assert start >= 1, "the first window is exact: nothing is known to guess from"
    known = abs(noise[start] - noise[start - 1])
    error = 0.0
    for position in range(start + 1, start + size):
        step = abs(noise[position + 1] - noise[position])
        reach = abs(noise[position] - noise[start])
        error += step * reach * (reach / 2 + known) * gain(noise[position])
    return error * error


def gain(noise: float) -> float:
    """What an error of the latents at this noise fraction s does to the result: 1 / (s (1 - s)^2).

    The network's answer to it is about 1/s of it. And where 1 - s, the part of the picture in the
    latents, is small, small errors decide which picture is made: the square was found by
    measurement, on three models and eight grids (docs/log.md).
    """
    return 1 / (max(noise, _LEAST) * max(1 - noise, _LEAST) ** 2)


def distrust(start: int, size: int) -> float:
    """Factor on a *measured* error of a window that reaches further ahead than its history.

    Local errors of early windows look small and decide what the picture becomes: on the shipped
    DiT, p = 8, windows `1 8 8 ..` gave one picture in six a different garment (docs/log.md).
    The analytic `tail_cost` knows early windows by `gain`.
    """
    return max(1.0, size / start) ** _DISTRUST


def best(
    num_steps: int,
    degree: int,
    depth: Fraction | int,
    cost: StepCost,
    window_cost: WindowCost | None = None,
) -> tuple[int, ...]:
    """Windows of least summed cost(start, size) whose depth is at most `depth`.

    cost is called for every start >= 1 and size 1..degree that fits, and must not be negative;
    infinity forbids a window.
    window_cost(size) is the time of a window in sequential steps, an exact rational above 0
    (floats are refused): 1 by default, below 1 for size 1 where exact steps are split over ranks,
    above 1 for windows batched on one device. Exact dynamic programme, O(N depth degree) for unit
    cost; equal costs go to the larger earlier window.
    Raises PlanMismatch unless 1 <= degree <= num_steps, if depth is below the least possible, or
    if nothing of finite cost fits.
    Source: design brief of step parallelism, section 4.2.
    """
    _check_degree(num_steps, degree)
    times, units = _in_units(degree, window_cost)
    least = _least_times(num_steps, times)
    budget = math.floor(depth * units)
    if budget < least[0]:
        raise PlanMismatch(
            f"depth {depth} is too small for {num_steps} steps on {degree} step ranks: "
            f"at least {Fraction(least[0], units)}\n"
            f"  why: the first step stands alone and a window holds at most {degree} steps\n"
            f"  to fix: depth {Fraction(least[0], units)} or more, more step ranks, or fewer steps"
        )
    budget = min(budget, num_steps * max(times))
    choice = _solve(times, budget, least, cost)
    windows, start = [], 0
    while start < num_steps:
        size = choice[start][budget]
        if size == 0:
            raise PlanMismatch(
                f"no finite cost from step {start} of {num_steps} within depth {depth}\n"
                "  why: every choice of windows there costs infinity or NaN"
            )
        windows.append(size)
        budget -= times[size]
        start += size
    return tuple(windows)


def tail(noise: Sequence[float], degree: int, depth: int | None = None) -> tuple[int, ...]:
    """Windows of least `tail_cost` at `depth` (default: `default_depth`), without calibration.

    noise holds s_0..s_N in [0, 1], one more than there are steps. Flow schedulers: s = sigma;
    others: s = sigma / (1 + sigma).
    Raises PlanMismatch for noise outside [0, 1], and as `best` does.
    """
    num_steps = len(noise) - 1
    for index, value in enumerate(noise):
        if not 0.0 <= value <= 1.0:
            raise PlanMismatch(
                f"noise fraction {index} of {num_steps} is {value}, outside [0, 1]\n"
                "  why: window costs compare noise fractions, not sigmas\n"
                "  to fix: s = sigma for flow schedulers, sigma / (1 + sigma) for others"
            )
    if depth is None:
        depth = default_depth(num_steps, degree)
    return best(num_steps, degree, depth, lambda start, size: tail_cost(noise, start, size))


def depth(windows: Sequence[int], window_cost: WindowCost | None = None) -> Fraction | int:
    """Time of all windows in sequential steps: their number, or the sum of window_cost(size)."""
    if window_cost is None:
        return len(windows)
    return sum(window_cost(size) for size in windows)


def calls(windows: Sequence[int], rank: int) -> int:
    """Steps at which step rank `rank` evaluates the denoiser.

    Every rank evaluates an exact step (or its share of the batch); rank r takes part in a window
    of size W > 1 where r < W.
    """
    return sum(1 for size in windows if size == 1 or rank < size)


def check(windows: Sequence[int], num_steps: int, degree: int) -> None:
    """Raise PlanMismatch, with both sides, unless the windows fit N steps on `degree` ranks.

    They sum to num_steps, start with 1 and lie in 1..degree.
    """
    _check_degree(num_steps, degree)
    listed = " ".join(map(str, windows))
    if sum(windows) != num_steps:
        raise PlanMismatch(
            f"windows cover {sum(windows)} steps, the scheduler takes {num_steps}: {listed}\n"
            "  why: every step lies in exactly one window\n"
            f"  to fix: sizes that sum to {num_steps}, or run {sum(windows)} steps"
        )
    for index, size in enumerate(windows):
        if not 1 <= size <= degree:
            raise PlanMismatch(
                f"window {index} has size {size}, allowed is 1..{degree}: {listed}\n"
                "  why: each step of a window is evaluated by a step rank of its own\n"
                f"  to fix: sizes up to {degree}, or step={max(windows)}"
            )
    if windows[0] != 1:
        raise PlanMismatch(
            f"the first window is {windows[0]}, it must be 1: {listed}\n"
            "  why: before the first exact prediction there is nothing to guess from\n"
            f"  to fix: start with 1, as in 1 {windows[0] - 1} ..."
        )


def _check_degree(num_steps: int, degree: int) -> None:
    if num_steps < 1:
        raise PlanMismatch(f"{num_steps} denoising steps: a run takes at least 1")
    if not 1 <= degree <= num_steps:
        raise PlanMismatch(
            f"step={degree} for {num_steps} denoising steps\n"
            "  why: each step rank evaluates a step of its own\n"
            f"  to fix: step between 1 and {num_steps}"
        )


def _in_units(degree: int, window_cost: WindowCost | None) -> tuple[list[int], int]:
    """Time of each window size (index 0 unused) in whole units, and the units of one step."""
    if window_cost is None:
        return [0] + [1] * degree, 1
    times = [window_cost(size) for size in range(1, degree + 1)]
    for size, time in enumerate(times, start=1):
        if not isinstance(time, (Fraction, int)) or time <= 0:
            raise PlanMismatch(
                f"window_cost({size}) is {time!r}, it must be an int or Fraction above 0\n"
                "  why: depths are compared exactly\n"
                "  to fix: round a measured time, as in Fraction(round(20 * seconds / step), 20)"
            )
    units = math.lcm(*(Fraction(time).denominator for time in times))
    return [0] + [int(time * units) for time in times], units


def _least_times(num_steps: int, times: list[int]) -> list[int]:
    """For each start, the smallest time that covers the steps from there to the end."""
    least = [0] * (num_steps + 1)
    for start in range(num_steps - 1, -1, -1):
        largest = 1 if start == 0 else min(len(times) - 1, num_steps - start)
        least[start] = min(times[size] + least[start + size] for size in range(1, largest + 1))
    return least


def _solve(times: list[int], budget: int, least: list[int], cost: StepCost) -> list[list[int]]:
    """Best window size for each (start, remaining budget); 0 where nothing fits."""
    num_steps = len(least) - 1
    rows = [[math.inf] * (budget + 1) for _ in range(num_steps)] + [[0.0] * (budget + 1)]
    choice = [[0] * (budget + 1) for _ in range(num_steps)]
    for start in range(num_steps - 1, -1, -1):
        row, chosen = rows[start], choice[start]
        largest = 1 if start == 0 else min(len(times) - 1, num_steps - start)
        # Largest first and replaced only by a smaller sum: ties go to the larger earlier window.
        for size in range(largest, 0, -1):
            added = cost(start, size) if start else 0.0
            after = rows[start + size]
            time = times[size]
            for left in range(time + least[start + size], budget + 1):
                total = added + after[left - time]
                if total < row[left]:
                    row[left], chosen[left] = total, size
    return choice
