"""Which windows a plan walks on a noise grid, where that is decided before the run."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.errors import PlanMismatch
from stretto.plan.options import Fixed, Listed, Parastep, Steps, Tail
from stretto.search import windows


def resolve(steps: Steps, noise: Sequence[float]) -> tuple[int, ...]:
    """Window sizes on the grid `noise` (N + 1 fractions s_0..s_N).

    Raises PlanMismatch when the option does not fit N steps, and for windows that only a run
    (`adaptive`) or a file beside a pipeline (`calibrated`) decides.
    """
    num_steps, degree, option = len(noise) - 1, steps.degree, steps.windows
    if degree == 1:
        return (1,) * num_steps
    if isinstance(option, Parastep):
        warmup = min(5, max(1, num_steps // 4)) if option.warmup is None else option.warmup
        sizes = windows.published(num_steps, degree, warmup)
    elif isinstance(option, Tail):
        _check_depth(option, num_steps, degree)
        sizes = windows.tail(noise, degree, option.depth)
    elif isinstance(option, Fixed):
        sizes = windows.fixed(num_steps, degree, option.warmup, option.cooldown)
    elif isinstance(option, Listed):
        sizes = option.sizes
    else:
        raise PlanMismatch(
            f"the sizes of {option.short()!r} windows are not known before the run\n"
            f"  why: {option.kind} windows depend on the pipeline\n"
            "  to fix: estimate with windows `tail` at the same depth, or with `listed` sizes"
        )
    windows.check(sizes, num_steps, degree)
    return tuple(sizes)


def _check_depth(option: Tail, num_steps: int, degree: int) -> None:
    """Raise PlanMismatch for more evaluations than there are steps: all would be exact, unasked."""
    if option.depth is not None and option.depth > num_steps:
        raise PlanMismatch(
            f"depth {option.depth} of {num_steps} steps\n"
            "  why: depth counts evaluations one after another, and at one a step all are exact\n"
            f"  to fix: depth {windows.least_depth(num_steps, degree)} to {num_steps}, or no step "
            "axis for all of them exact"
        )


def guess_error(sizes: Sequence[int], noise: Sequence[float]) -> float:
    """Expected error of the guesses, a relative figure: compare it within one noise grid only.

    The root of the summed `tail_cost`; 0 when every step is exact.
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pairs = zip(starts, sizes, strict=True)
    return sum(windows.tail_cost(noise, start, size) for start, size in pairs) ** 0.5
