"""A text-conditioned diffusion transformer over patches, its tokens splittable over ranks.

B batch   T patches on this rank   S text tokens   H heads   D head dim   M model width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stretto.parallel.context import Attention

#: Width of the sinusoidal time features; the value of the DiT reference model.
TIME_FEATURES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DitShape:
    """Sizes of a DiT. `patch`: numbers in one patch; `text`: rows of the text embedding."""

    layers: int
    width: int
    heads: int
    patch: int
    text: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def multiplied(self) -> int:
        """Parameters that every patch is multiplied with; those of text and time are not."""
        # Self-attention 4, cross-attention query and output 2, feed-forward 8.
        return self.layers * 14 * self.width**2 + 2 * self.patch * self.width


class Dit(nn.Module):
    """Predicts the velocity (noise minus data) of each patch from all patches, text and time.

    Source: Scalable Diffusion Models with Transformers, ICCV 2023, section 3.2 (adaLN-zero), with
    cross-attention to text as in PixArt-alpha.
    """

    def __init__(self, shape: DitShape, *, recompute: bool = False):
        super().__init__()
        self.shape = shape
        self.patches = nn.Linear(shape.patch, shape.width)
        self.text = nn.Embedding(shape.text, shape.width)
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, shape.width), nn.SiLU(), nn.Linear(shape.width, shape.width)
        )
        self.blocks = nn.ModuleList(DitBlock(shape, recompute) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(shape.width, 2 * shape.width)
        self.head = nn.Linear(shape.width, shape.patch)

    def forward(
        self,
        patches_BTP: torch.Tensor,
        places_T2: torch.Tensor,
        noise_B: torch.Tensor,
        text_BS: torch.Tensor,
    ) -> torch.Tensor:
        """(B, T, patch). `places`: row and column of each patch; `noise`: its share, in [0, 1].

        The text is whole on every rank: its keys are replicated, so cross-attention sends nothing.
        """
        dtype = self.patches.weight.dtype
        x_BTM = self.patches(patches_BTP.to(dtype))
        x_BTM = x_BTM + plane_features(places_T2, self.shape.width).to(x_BTM.dtype)
        text_BSM = self.text(text_BS)
        time_BM = self.time(wave_features(1000 * noise_B, TIME_FEATURES).to(x_BTM.dtype))
        time_BM = functional.silu(time_BM)
        for block in self.blocks:
            x_BTM = block(x_BTM, text_BSM, time_BM)
        shift, scale = self.modulation(time_BM).chunk(2, -1)
        # A clone, as a linear layer with bias returns a view, on which shards' hooks can be lost.
        return self.head(modulated(self.norm(x_BTM), shift, scale)).clone()

    def initial(self, name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """First values: gates and the output are zero, so every block starts as the identity."""
        if name.endswith("bias") or "modulation" in name or name.startswith("head"):
            return torch.zeros(size)
        if name.startswith("text"):
            return torch.randn(size, generator=generator) * 0.02
        limit = (6 / sum(size)) ** 0.5
        return (torch.rand(size, generator=generator) * 2 - 1) * limit


class DitBlock(nn.Module):
    """Self-attention over all patches, attention to the text, feed-forward."""

    def __init__(self, shape: DitShape, recompute: bool):
        super().__init__()
        width = shape.width
        self.shape = shape
        self.recompute = recompute
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention = Attention()
        self.out = nn.Linear(width, width)
        self.text_query = nn.Linear(width, width)
        self.text_key = nn.Linear(width, 2 * width)
        self.text_out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTM, text_BSM, time_BM):
        q, k, v = self._run(self.before, x_BTM, time_BM)
        attended = self.attention(q, k, v)
        return self._run(self.after, x_BTM, attended, text_BSM, time_BM)

    def before(self, x_BTM, time_BM):
        """Queries, keys and values of the patches, each (B, H, T, D)."""
        shift, scale, *_ = self.modulation(time_BM).chunk(6, -1)
        heads = self.qkv(modulated(self.norm(x_BTM), shift, scale))
        return tuple(self._heads(part) for part in heads.chunk(3, -1))

    def after(self, x_BTM, attended_BHTD, text_BSM, time_BM):
        _, _, gate, shift, scale, second_gate = self.modulation(time_BM).chunk(6, -1)
        x_BTM = x_BTM + gate[:, None] * self.out(_tokens(attended_BHTD))
        x_BTM = x_BTM + self._from_text(x_BTM, text_BSM)
        fed = self.up(modulated(self.norm(x_BTM), shift, scale))
        return x_BTM + second_gate[:, None] * self.down(functional.gelu(fed, approximate="tanh"))

    def _from_text(self, x_BTM, text_BSM):
        q = self._heads(self.text_query(self.norm(x_BTM)))
        k, v = (self._heads(part) for part in self.text_key(text_BSM).chunk(2, -1))
        return self.text_out(_tokens(functional.scaled_dot_product_attention(q, k, v)))

    def _heads(self, x_BTM):
        return x_BTM.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)

    def _run(self, part, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)


def modulated(x_BTM: torch.Tensor, shift_BM: torch.Tensor, scale_BM: torch.Tensor) -> torch.Tensor:
    """Every token of an item shifted and scaled alike."""
    return x_BTM * (1 + scale_BM[:, None]) + shift_BM[:, None]


def wave_features(values: torch.Tensor, width: int) -> torch.Tensor:
    """(..., width): cosines and sines of a value at wavelengths from 2 pi to 2 pi 10 000."""
    half = torch.arange(width // 2, device=values.device, dtype=torch.float64)
    angles = values[..., None].double() * 10_000.0 ** (-half / (width // 2))
    return torch.cat((angles.cos(), angles.sin()), -1)


def plane_features(places_T2: torch.Tensor, width: int) -> torch.Tensor:
    """(T, width): features of the row beside those of the column."""
    return wave_features(places_T2, width // 2).flatten(1)


def _tokens(x_BHTD: torch.Tensor) -> torch.Tensor:
    return x_BHTD.transpose(1, 2).flatten(2)
