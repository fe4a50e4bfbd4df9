"""Closeness measured by what the tested dtype itself costs on the same data."""

from __future__ import annotations

import torch
from torch import Tensor

#: float64 is compared with a brute force of its own precision, so its allowance is relative.
FLOAT64_TOLERANCE = 1e-12


def assert_close(
    x: Tensor, base: Tensor, ref: Tensor, *, factor: float = 2.0, what: str = ""
) -> None:
    """Require `x` to be as near to `ref` as `base`, within `factor`.

    `ref` is the answer in float64, `base` the plain computation in x's dtype on the same inputs.
    Allowed is factor * max(max|base - ref|, eps(dtype) * max|ref|); for float64
    1e-12 * max(1, max|ref|). NaN, infinities in other places and other shapes fail.
    Raises AssertionError with the ratio of error to allowance.
    """
    error, allowed = distance(x, ref), allowance(x.dtype, base, ref, factor)
    ratio = error / allowed if allowed else float("inf") if error else 0.0
    name = f"{what}: " if what else ""
    assert error <= allowed, (
        f"{name}error {error:.3g} is {ratio:.3g} times the {allowed:.3g} that "
        f"{str(x.dtype).removeprefix('torch.')} allows on this data"
    )


def distance(x: Tensor, ref: Tensor) -> float:
    """max|x - ref| in float64; equal infinities count 0, a NaN on either side is infinitely far."""
    assert x.shape == ref.shape, f"shape {tuple(x.shape)} against {tuple(ref.shape)}"
    if x.numel() == 0:
        return 0.0
    a, b = x.detach().to("cpu", torch.float64), ref.detach().to("cpu", torch.float64)
    gap = torch.where(a == b, 0.0, (a - b).abs())
    return torch.where(gap.isnan(), float("inf"), gap).max().item()


def allowance(dtype: torch.dtype, base: Tensor, ref: Tensor, factor: float) -> float:
    """How far a result in `dtype` may lie from `ref`."""
    finite = ref.detach().to("cpu", torch.float64)
    finite = finite[finite.isfinite()]
    peak = finite.abs().max().item() if finite.numel() else 0.0
    if dtype == torch.float64:
        return FLOAT64_TOLERANCE * max(1.0, peak)
    return factor * max(distance(base, ref), torch.finfo(dtype).eps * peak)
