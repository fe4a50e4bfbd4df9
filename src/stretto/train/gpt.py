"""A decoder-only transformer over packed documents: pre-norm, rotary positions, SwiGLU.

B batch   T tokens on this rank   H query heads   G key/value heads   D head dim   M model width
V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stretto.parallel.context import Attention
from stretto.train.text import VOCABULARY

#: Base of the rotary angles; 10 000 in RoFormer, higher for long sequences (Llama 3: 500 000).
ROTARY_BASE = 500_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GptShape:
    """Sizes of a GPT. `hidden`: feed-forward width; `window`: keys that a token sees, itself
    included, None for all before it. Head dim is width / heads.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = VOCABULARY
    window: int | None = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but embedding and norms."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.hidden) + self.width * (
            self.vocabulary
        )


class Gpt(nn.Module):
    """Tokens in, logits out. `recompute`: keep only what attention needs, and its inputs."""

    def __init__(self, shape: GptShape, *, recompute: bool = False):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(GptBlock(shape, recompute) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_T: torch.Tensor,
        documents: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """(B, T, V). Positions count within a document; `documents` sum to the whole sequence."""
        x_BTM = self.embedding(tokens_BT)
        rotation = rotary(positions_T, self.shape.head_dim, x_BTM.dtype)
        for block in self.blocks:
            x_BTM = block(x_BTM, rotation, documents)
        return self.head(self.norm(x_BTM))

    def initial(self, name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """First values of a parameter: normal, narrower where a block adds to its input."""
        if name.endswith("norm.weight"):
            return torch.ones(size)
        # Variance of the sum over all blocks stays that of one (GPT-2).
        narrow = name.endswith(("out.weight", "down.weight"))
        std = 0.02 / (2 * self.shape.layers) ** 0.5 if narrow else 0.02
        return torch.randn(size, generator=generator) * std


class GptBlock(nn.Module):
    """Attention and feed-forward. Recomputation stops at attention, which is never run twice."""

    def __init__(self, shape: GptShape, recompute: bool):
        super().__init__()
        self.shape = shape
        self.recompute = recompute
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.qkv = nn.Linear(
            shape.width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=False
        )
        self.attention = Attention()
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.feed_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BTM, rotation, documents):
        q, k, v = self._run(self.before, x_BTM, rotation)
        mask = {"causal": True, "window": self.shape.window, "documents": documents}
        attended = self.attention(q, k, v, **mask)
        return self._run(self.after, x_BTM, attended)

    def before(self, x_BTM, rotation):
        """Queries (B, H, T, D), keys and values (B, G, T, D)."""
        shape = self.shape
        heads = self.qkv(self.attention_norm(x_BTM)).unflatten(-1, (-1, shape.head_dim))
        q, k, v = heads.transpose(1, 2).split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        return rotated(q, rotation), rotated(k, rotation), v

    def after(self, x_BTM, attended_BHTD):
        x_BTM = x_BTM + self.out(attended_BHTD.transpose(1, 2).flatten(2))
        gate, value = self.up(self.feed_norm(x_BTM)).chunk(2, -1)
        return x_BTM + self.down(functional.silu(gate) * value)

    def _run(self, part, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)


def rotary(
    positions_T: torch.Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (T, D/2) of each token's angles; float32, of a float64 model float64.

    Source: RoFormer, section 3.2.
    """
    half = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float64)
    angles = positions_T[:, None].double() * ROTARY_BASE ** (-half / head_dim)
    kept = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(kept), angles.sin().to(kept)


def rotated(x_BHTD: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The two halves of every head turned against each other, in the rotation's dtype inside."""
    cosine, sine = rotation
    first, second = x_BHTD.to(cosine.dtype).chunk(2, -1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.cat(turned, -1).to(x_BHTD.dtype)
