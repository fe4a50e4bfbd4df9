"""Captioned patterns for the DiT presets: endless, any size, and learnable from the caption.

A latent is a plane wave per channel whose direction and period the caption states and whose phases
are drawn. Everything about sample i of a seed is a function of both, drawn whole and in float64
before anything is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CHANNELS = 4
#: Numbers a side of a square patch; a token is CHANNELS * PATCH**2 numbers.
PATCH = 2
#: Captions are padded to this many bytes.
CAPTION_BYTES = 40
_ANGLES = 8
_PERIODS = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Noised:
    """Latents on their way to noise, as patches in reading order.

    patches, velocity: (B, N, patch) float64, velocity = noise - latent. places: (N, 2) row and
    column. noise: (B,) share of noise in [0, 1). text: (B, CAPTION_BYTES) int64.
    """

    patches: torch.Tensor
    velocity: torch.Tensor
    places: torch.Tensor
    noise: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True, slots=True)
class Patterns:
    """The samples of a seed; a split is a stream of its own."""

    seed: int
    split: int = 0

    def noised(self, first: int, grid: int, count: int = 1) -> Noised:
        """Samples `first` to `first + count` of grid x grid patches."""
        drawn = [self._draw(first + index, grid * PATCH) for index in range(count)]
        latents, noises, shares, captions = zip(*drawn, strict=True)
        latent, noise = (torch.from_numpy(np.stack(part)) for part in (latents, noises))
        share = torch.tensor(shares, dtype=torch.float64)
        mixed = latent + share[:, None, None, None] * (noise - latent)
        lines = torch.arange(grid)
        places = torch.cartesian_prod(lines, lines)
        return Noised(_patched(mixed), _patched(noise - latent), places, share, _text(captions))

    def _draw(self, index: int, side: int) -> tuple[np.ndarray, np.ndarray, float, str]:
        drawn = np.random.Generator(np.random.Philox(key=[self.seed, 2 * index + self.split]))
        angle, period = drawn.integers(_ANGLES), _PERIODS[drawn.integers(len(_PERIODS))]
        phases = drawn.uniform(0, 2 * np.pi, (CHANNELS, 1, 1))
        row, column = np.mgrid[:side, :side]
        theta = np.pi * angle / _ANGLES
        along = (column * np.cos(theta) + row * np.sin(theta)) / period
        latent = np.sin(2 * np.pi * along + phases)
        noise = drawn.standard_normal(latent.shape)
        caption = f"waves at {180 * angle / _ANGLES:g} degrees, period {period}"
        return latent, noise, float(drawn.uniform()), caption


def _patched(x_BCHW: torch.Tensor) -> torch.Tensor:
    x = x_BCHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _text(captions: tuple[str, ...]) -> torch.Tensor:
    padded = (caption.encode().ljust(CAPTION_BYTES) for caption in captions)
    return torch.tensor([list(caption) for caption in padded])
