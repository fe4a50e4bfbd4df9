"""How weights follow gradients: torch's optimizers under a cosine schedule with warm-up."""

from __future__ import annotations

import math

import torch
from torch import nn

from stretto.train.recipe import Descent


def optimizer_of(model: nn.Module, descent: Descent) -> torch.optim.Optimizer:
    """SGD or AdamW; weight decay on matrices alone, as is usual."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": descent.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if descent.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=descent.rate, foreach=True)
    return torch.optim.AdamW(groups, lr=descent.rate, betas=descent.betas, foreach=True)


def rate_at(descent: Descent, step: int, steps: int) -> float:
    """Learning rate of step 0 .. steps-1: up in a line, down along a cosine.

    A function of the step, so there is no scheduler whose state could be lost.
    """
    if step < descent.warmup:
        return descent.rate * (step + 1) / descent.warmup
    done = min(1.0, (step - descent.warmup) / max(1, steps - 1 - descent.warmup))
    low = descent.rate * descent.final
    return low + (descent.rate - low) * (1 + math.cos(math.pi * done)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
