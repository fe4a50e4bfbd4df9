"""Guesses of guided predictions that a step rank has not computed: extrapolation in noise.

A predictor sees the true guided predictions g_0, g_1, ... in step order, each with its noise
fraction s, and guesses the next ones: horizon h = 1 is the step right after the last known one.
A window's guesses are made at once, as each on its own would cost a GPU a kernel more.
All arithmetic is a fixed sequence of tensor operations, so ranks that hold the same history on
the same kind of device hold the same bits.
"""

from __future__ import annotations

import difflib
import math
from array import array
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stretto.diffusion.deferred import on_device
from stretto.errors import ConfigError
from stretto.plan.options import PREDICTORS

# Damping before the first fit of a horizon: between repeating (0) and the undamped line (1).
# Borrowing the fit of a nearer horizon instead cost up to 13 dB (10 Gaussians in 64 dimensions,
# N 50, p 8, five exact steps first; float64, naive.py): nearer horizons are damped less.
_UNFITTED = 0.5


class Predictor(Protocol):
    """What a run asks of a predictor, in step order; any object with these methods will do.

    `needs_own_output`: guesses are this rank's own remembered outputs, so none are asked for here.
    """

    needs_own_output: bool

    def reset(self) -> None:
        """A new generation starts."""

    def append(self, s: float, g: Tensor) -> None:
        """Take the next true guided prediction, at noise fraction s."""

    def close_window(self, start: int, size: int) -> None:
        """Steps start .. start + size - 1 have been appended."""

    def guesses(self, noise: Sequence[float]) -> Sequence[Tensor]:
        """The predictions of the steps after the last known one, at these noise fractions."""
        ...


class Extrapolation:
    """Polynomial of `order` in s through the newest predictions, damped towards the newest one.

    guess = g_last + b_h * (extrapolation - g_last), of lower order while fewer predictions are
    known. b_h, one number per horizon, is 1 undamped, stored, or fitted by least squares to what
    the last window that reached horizon h turned out to be (0.5 before, clipped to [0, 1]).
    Exact for predictions that are polynomials of `order` in s (undamped); order 0 repeats.
    Kept are order + 1 predictions by reference, and in wide dtype what they differ by.
    Source: design brief of step parallelism, section 5.7.
    """

    needs_own_output = False

    def __init__(self, order: int, damping: Sequence[float] | None = None, fitted: bool = False):
        self._order = order
        self._stored = None if damping is None else tuple(map(float, damping))
        self._is_fitted = fitted
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new generation starts."""
        self._known: list[tuple[float, Tensor]] = []
        self._line: _Line | None = None
        self._base: _Line | None = None
        self._num_appended = 0
        #: Fitted damping of horizons 1, 2, ...: one tensor, so that a window refits it as a whole.
        self._fits: Tensor | None = None
        #: What followed the base in this window, horizon by horizon.
        self._followed: list[tuple[float, Tensor]] = []

    @property
    def damping(self) -> dict[int, float]:
        """Damping in force per horizon, stored or fitted so far (waits for the device)."""
        if self._stored is not None:
            return dict(enumerate(self._stored, start=1))
        return {} if self._fits is None else dict(enumerate(self._fits.tolist(), start=1))

    def append(self, s: float, g: Tensor) -> None:
        """Take the next true guided prediction, any shape and floating dtype, at noise s.

        It replaces a known one at the same s (the stages of Heun's method share one): the newer
        belongs to the truer latents, and extrapolation divides by differences of s.
        """
        self._num_appended += 1
        if self._base is not None:
            self._followed.append((s, g))
        others = [entry for entry in self._known if entry[0] != s]
        self._known = [*others, (s, g)][-(self._order + 1) :]
        self._line = None
        if self._base is None:
            # Too early to fit from what preceded the window: fit from its own first predictions.
            self._rebase()

    @torch.no_grad()
    def close_window(self, start: int, size: int) -> None:
        """Note that steps start .. start + size - 1 have been appended: the next fit starts here.

        To be called after every window, exact steps included, on every rank.
        """
        assert self._num_appended == start + size, (
            f"window {start}+{size} closes, but {self._num_appended} predictions were appended"
        )
        if self._base is not None and self._followed:
            self._fits = _refitted(self._fits, self._base.slopes_to(self._followed))
        self._rebase()

    @torch.no_grad()
    def guesses(self, noise: Sequence[float]) -> Sequence[Tensor]:
        """Guesses of the predictions after the last known one, horizons 1, 2, ..., at `noise`.

        Returns tensors of its shape and dtype; sums are float32 (float64 for float64).
        Needs one appended prediction. Raises ConfigError for more guesses than stored damping.
        """
        assert self._known, "the first step of a run is exact: nothing is known to guess from"
        if len(self._known) == 1 or not noise:
            return [self._known[-1][1]] * len(noise)
        return self._current().at(noise, self._damping_of(len(noise)))

    def _damping_of(self, reached: int) -> Tensor | Sequence[float]:
        """Damping of horizons 1 .. reached."""
        if self._is_fitted:
            return [_UNFITTED] * reached if self._fits is None else _padded(self._fits, reached)
        if self._stored is None:
            return [1.0] * reached
        if reached > len(self._stored):
            raise ConfigError(
                f"stored damping has {len(self._stored)} horizons, a window asks for {reached}\n"
                "  why: it was made for a smaller step degree\n"
                f"  to fix: calibrate for a degree of at least {reached + 1}, or leave damping out"
            )
        return self._stored[:reached]

    def _current(self) -> _Line:
        """The line through all that is known, made once until the next prediction comes."""
        if self._line is None:
            self._line = _Line(self._known)
        return self._line

    def _rebase(self) -> None:
        self._followed = []
        self._base = self._current() if self._is_fitted and len(self._known) == 2 else None


def _padded(fits: Tensor, reached: int) -> Tensor:
    """The first `reached` fits, with horizons that no window has reached yet."""
    if len(fits) >= reached:
        return fits[:reached]
    return torch.cat([fits, fits.new_full((reached - len(fits),), _UNFITTED)])


def _refitted(earlier: Tensor | None, slopes: Tensor) -> Tensor:
    """Damping per horizon after a window that reached the first len(slopes) of them.

    No branch on a device value: it would wait for the device.
    """
    reached = len(slopes)
    before = _padded(slopes[:0] if earlier is None else earlier, reached)
    # 0 / 0 where the base does not change: nothing is learned, what was fitted before stays.
    fits = torch.where(slopes.isnan(), before, slopes.clamp(0, 1))
    beyond = None if earlier is None else earlier[reached:]
    return fits if beyond is None or not len(beyond) else torch.cat([fits, beyond])


class _Line:
    """Polynomial through predictions with distinct abscissas, as changes from the newest.

    Lagrange weights sum to 1, so differences from the newest prediction carry all of it and a
    constant is reproduced bitwise. Sums are float32 (float64 for float64); operands of mixed
    dtypes are promoted inside one kernel, where a conversion beforehand would be one more.
    """

    def __init__(self, known: Sequence[tuple[float, Tensor]]):
        self._known = tuple(known)
        self._newest = known[-1][1]
        self._wide = torch.promote_types(self._newest.dtype, torch.float32)
        self._last = self._newest.to(self._wide)
        with torch.no_grad():
            self._differences = [g - self._last for _, g in known[:-1]]

    def at(self, noise: Sequence[float], damping: Tensor | Sequence[float]) -> Sequence[Tensor]:
        """Newest prediction plus the damped change to each s, in the predictions' dtype."""
        if not self._differences:
            return [self._newest] * len(noise)
        shape = (len(noise), *self._newest.shape)
        found, final = self._newest, len(self._differences) - 1
        for i, difference in enumerate(self._differences):
            dtype = self._newest.dtype if i == final else self._wide
            out = torch.empty(shape, dtype=dtype, device=found.device)
            factors = self._factors(i, noise, damping).view(-1, *[1] * difference.ndim)
            found = torch.addcmul(found, difference, factors, out=out)
        return found.unbind()

    def slopes_to(self, followed: Sequence[tuple[float, Tensor]]) -> Tensor:
        """b of least squares in g = last + b * change(s), for a straight line and each (s, g).

        All at once: a window's handful of operations each on its own would cost more than the sums.
        """
        (difference,) = self._differences
        first = self._known[0][1]
        # Autocast on a GPU would sum in half precision, where a square of latents overflows, and
        # no autocast stacks tensors of another half precision than its own.
        with torch.autocast(first.device.type, enabled=False):
            changes = torch.stack([first, *(g for _, g in followed)]) - self._last
            sums = torch.mv(changes.flatten(1), difference.flatten())
        # Stages of one noise level say nothing of the slope: x / 0 would pass for a fit of 0 or 1.
        weights = self._on_device([self._weight(0, s) or math.nan for s, _ in followed])
        return sums[1:] / (sums[0] * weights)

    def _factors(
        self, index: int, noise: Sequence[float], damping: Tensor | Sequence[float]
    ) -> Tensor:
        """What the change from one known prediction counts in the guess at each s."""
        weights = [self._weight(index, s) for s in noise]
        if isinstance(damping, Tensor):
            return self._on_device(weights) * damping
        return self._on_device([w * d for w, d in zip(weights, damping, strict=True)])

    def _weight(self, index: int, s: float) -> float:
        own = self._known[index][0]
        others = [at for k, (at, _) in enumerate(self._known) if k != index]
        return math.prod((s - other) / (own - other) for other in others)

    def _on_device(self, values: Sequence[float]) -> Tensor:
        # By way of an array: `torch.tensor` of a list counts as a wait for the device.
        code = "d" if self._wide == torch.float64 else "f"
        host = torch.frombuffer(array(code, values), dtype=self._wide)
        return on_device(host, self._newest.device)


class OwnOutput:
    """The published guess: the rank's own last output, which the pipeline itself recombined.

    Holds nothing; the caller feeds the pipeline the remembered raw output and takes the guided
    prediction that comes out of it.
    Source: ParaStep, NeurIPS 2025 (arXiv 2505.14741).
    """

    needs_own_output = True

    @property
    def damping(self) -> dict[int, float]:
        """No damping: always empty."""
        return {}

    def reset(self) -> None:
        """Nothing is held."""

    def append(self, s: float, g: Tensor) -> None:
        """Nothing is held."""

    def close_window(self, start: int, size: int) -> None:
        """Nothing is held."""

    def guesses(self, noise: Sequence[float]) -> Sequence[Tensor]:
        """Nobody asks: the pipeline recombines remembered outputs by itself."""
        raise AssertionError("predictor own: the guess is what the pipeline recombined")


def make_predictor(name: str, damping: Sequence[float] | None = None) -> Predictor:
    """Predictor by name: damped, repeat, own, taylor-1, taylor-2 or taylor-3.

    damping[h - 1] in [0, 1] is the stored damping of horizon h, for `damped` only; None or empty
    fits it online.
    Raises ConfigError for an unknown name or a damping that cannot be used.
    """
    if name not in PREDICTORS:
        raise ConfigError(_unknown(name))
    if damping is not None and len(damping) > 0:
        _check_damping(name, damping)
        return Extrapolation(1, damping=damping)
    if name == "own":
        return OwnOutput()
    if name == "damped":
        return Extrapolation(1, fitted=True)
    return Extrapolation(0 if name == "repeat" else int(name.removeprefix("taylor-")))


def _check_damping(name: str, damping: Sequence[float]) -> None:
    if name != "damped":
        raise ConfigError(
            f"predictor {name!r} takes no stored damping, {len(damping)} values were given\n"
            "  to fix: predictor 'damped', or leave the damping out"
        )
    for horizon, value in enumerate(damping, start=1):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(
                f"damping of horizon {horizon} is {value}, outside [0, 1]\n"
                "  why: 0 repeats the newest prediction, 1 follows the line"
            )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, PREDICTORS, n=1)
    hint = f"\n  to fix: {near[0]!r} is the nearest" if near else ""
    return f"predictor {name!r} is unknown; known are {', '.join(PREDICTORS)}{hint}"
