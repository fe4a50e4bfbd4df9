"""What the shipped models learn: velocity for the DiT, noise for the U-Net twin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from stretto.diffusion.shipped.pipeline import ClassDiTPipeline, ClassPipeline
from stretto.diffusion.shipped.recipe import NUM_CLASSES

LABEL_DROP = 0.1  # The share that classifier-free guidance (2207.12598) found best.

Denoiser = Callable[..., Any]
Loss = Callable[[Denoiser, torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def loss_of(pipeline: ClassPipeline, device: torch.device) -> Loss:
    """The loss that a pipeline's denoiser is trained with, its tables on the device."""
    if isinstance(pipeline, ClassDiTPipeline):
        return flow_loss
    return partial(epsilon_loss, abar=pipeline.scheduler.alphas_cumprod.to(device))


def flow_loss(
    model: Denoiser, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the velocity, at logit-normal noise levels.

    x is (B, C, H, W) in [-1, 1], y (B,) labels; a tenth of them become the null class.
    Source: Scaling Rectified Flow Transformers, 2403.03206, section 3.1 (location 0, scale 1).
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    sigma = torch.randn(len(x), generator=generator, device=x.device).sigmoid()
    s = sigma[:, None, None, None]
    velocity = model((1 - s) * x + s * noise, sigma * 1000, _dropped(y, generator)).sample
    return torch.nn.functional.mse_loss(velocity.float(), noise - x)


def epsilon_loss(
    model: Denoiser,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    abar: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the noise, at uniform timesteps of the grid abar (signal power).

    Source: Denoising Diffusion Probabilistic Models, 2006.11239, equation 14.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    t = torch.randint(len(abar), (len(x),), generator=generator, device=x.device)
    a = abar[t][:, None, None, None]
    epsilon = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, _dropped(y, generator)).sample
    return torch.nn.functional.mse_loss(epsilon.float(), noise)


def _dropped(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    dropped = torch.rand(len(y), generator=generator, device=y.device) < LABEL_DROP
    return torch.where(dropped, NUM_CLASSES, y)
