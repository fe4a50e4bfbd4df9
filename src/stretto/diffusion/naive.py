"""The specification: step-parallel schedules on plain callables, NumPy float64, rank by rank.

denoise(x, i) is the guided prediction of step i, step(x, g, i) the latents after it; both pure.
Schedules return the true latents x_0 .. x_N. Step i has noise fraction noise[i], all distinct.
"""

from itertools import pairwise

import numpy as np


def sequential(denoise, step, x, num_steps):
    """One step after another."""
    latents = [np.asarray(x, np.float64)]
    for i in range(num_steps):
        latents.append(step(latents[-1], denoise(latents[-1], i), i))
    return latents


def published(denoise, step, x, num_steps, degree, warmup):
    """ParaStep: every rank fills in its own last output, rank 0 walks with everybody's newest."""
    latents = sequential(denoise, step, x, warmup)
    own_cache = [denoise(latents[warmup - 1], warmup - 1)] * degree
    for start in range(warmup, num_steps, degree):
        size = min(degree, num_steps - start)
        for rank in range(size):
            own_x = latents[start]
            for position in range(rank):
                own_x = step(own_x, own_cache[rank], start + position)
            own_cache[rank] = denoise(own_x, start + rank)
        for position in range(size):
            latents.append(step(latents[-1], own_cache[position], start + position))
    return latents


def replay(denoise, step, x, windows, noise, guess, carry=None):
    """Windows with newest-known guesses; every rank then replays the true steps.

    guess(known, bounds, noise, horizon): known g_0 .. g_{n-1}, window starts so far and n.
    carry[i]: change of the prediction of step i per change of its latents, 0 if None.
    """
    latents, known, bounds = [np.asarray(x, np.float64)], [], [0]
    for size in windows:
        start, found = bounds[-1], []
        for rank in range(size):
            own_x = latents[start]
            for position in range(rank):
                own_x = step(own_x, guess(known, bounds, noise, position + 1), start + position)
            found.append((denoise(own_x, start + rank), own_x))
        for i, (g, own_x) in enumerate(found, start):
            known.append(g if carry is None else g + carry[i] * (latents[-1] - own_x))
            latents.append(step(latents[-1], known[-1], i))
        bounds.append(len(known))
    return latents


def repeat(known, bounds, noise, horizon):
    """The newest prediction again."""
    return known[-1]


def damped(known, bounds, noise, horizon):
    """Newest prediction plus the damped linear change in noise; horizon h fits its own damping."""
    n, damping = len(known), 0.5
    if n == 1:
        return known[-1]
    for start, end in pairwise(bounds):
        base = max(start, 2)  # a line needs two predictions before it
        target = base + horizon - 1
        if target < end:
            change = _line(known, noise, base, target)
            actual = known[target] - known[base - 1]
            if np.any(change):
                damping = np.clip(np.sum(change * actual) / np.sum(change**2), 0, 1)
    return known[-1] + damping * _line(known, noise, n, n + horizon - 1)


def _line(known, noise, base, target):
    slope = (known[base - 1] - known[base - 2]) / (noise[base - 1] - noise[base - 2])
    return slope * (noise[target] - noise[base - 1])
