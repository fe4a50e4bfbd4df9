"""Arithmetic of a denoising step: its rows, bytes and relative time when the batch is cut."""

from __future__ import annotations

from stretto.workload.model import Workload


def flow_noise(num_steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Noise fractions s_0..s_N of flow matching with Euler steps: even times, shifted, then 0.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.
    """
    times = [1 - step / num_steps for step in range(num_steps)]
    return (*(shift * t / (1 + (shift - 1) * t) for t in times), 0.0)


def noise_of(workload: Workload) -> tuple[float, ...]:
    """The noise fractions of a workload: its own, or those of the flow grid with its shift."""
    if workload.noise is not None:
        return workload.noise
    return flow_noise(workload.steps, workload.shift)


def branches(workload: Workload) -> int:
    """Predictions that guidance combines in one step."""
    return 1 if workload.guidance == "none" else 2


def calls_per_step(workload: Workload) -> int:
    """Denoiser calls of one step."""
    return 2 if workload.guidance == "calls" else 1


def rows_of(workload: Workload) -> int:
    """Batch of one denoiser call."""
    return workload.evaluation.rows or (2 if workload.guidance == "batch" else 1)


def raw_bytes_of(workload: Workload) -> int:
    """Output of one denoiser call: with batched guidance it holds both branches."""
    if workload.raw_bytes is not None:
        return workload.raw_bytes
    return workload.guided_bytes * (2 if workload.guidance == "batch" else 1)


def share(half_batch_cost: float, fraction: float) -> float:
    """Time of a part of the batch over that of all of it: the line through 1 and one half.

    half_batch_cost in (0, 1]. What the line says of a batch of nothing is launches and weights;
    it is never below zero: where halving gains more than half, parts gain in proportion.
    """
    if fraction == 1:
        return 1.0
    fixed = max(0.0, 2 * half_batch_cost - 1)
    return fixed + 2 * (half_batch_cost - fixed) * fraction


def chunks_of(rows: int, ranks: int) -> int:
    """How many ranks share a batch in equal parts: its largest divisor within `ranks`."""
    return max(k for k in range(1, min(rows, ranks) + 1) if rows % k == 0)
