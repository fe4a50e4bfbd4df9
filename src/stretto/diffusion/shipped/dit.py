"""A class-conditional diffusion transformer (DiT) as a diffusers model.

B batch   C channels   N tokens   M width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from stretto.errors import ConfigError

# Width of the sinusoidal time features; the value of the DiT reference model.
TIME_FEATURES = 256


@dataclass
class ClassDiTOutput(BaseOutput):
    """What the denoiser predicts, in the shape of its input."""

    sample: torch.Tensor


def modulate(x_BNM: torch.Tensor, shift_BM: torch.Tensor, scale_BM: torch.Tensor) -> torch.Tensor:
    """Shift and scale every token of an item alike."""
    return x_BNM * (1 + scale_BM[:, None]) + shift_BM[:, None]


class ClassDiTBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by time and class (adaLN-zero)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads=num_heads, dim_head=width // num_heads, bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BNM: torch.Tensor, condition_BM: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_BM).chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(x_BNM), shift1, scale1))
        x_BNM = x_BNM + gate1[:, None] * attended
        fed = self.ff(modulate(self.norm2(x_BNM), shift2, scale2))
        return x_BNM + gate2[:, None] * fed


class ClassDiT(ModelMixin, ConfigMixin):
    """Diffusion transformer over patches, conditioned on time and a class.

    `num_classes` counts the real classes; label `num_classes` is the null class of
    classifier-free guidance. `width` must be a multiple of `num_heads` and of 4, `sample_size`
    (pixels a side) a multiple of `patch_size`. The defaults are the shipped model: 196 tokens,
    1.87 M parameters. Raises ConfigError for sizes that do not divide.
    Source: Scalable Diffusion Models with Transformers, ICCV 2023, section 3.2 (adaLN-zero).
    """

    _no_split_modules: ClassVar = ["ClassDiTBlock"]
    _repeated_blocks: ClassVar = ["ClassDiTBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        patch_size: int = 2,
        in_channels: int = 1,
        width: int = 128,
        num_layers: int = 6,
        num_heads: int = 4,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        _check_sizes(sample_size, patch_size, width, num_heads)
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        grid = sample_size // patch_size
        position_NM = get_2d_sincos_pos_embed(width, grid, output_type="pt").float()
        self.register_buffer("position_NM", position_NM, persistent=False)
        self.time_features = Timesteps(TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_FEATURES, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(ClassDiTBlock(width, num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)

    def initialize(self) -> None:
        """Set the weights that training starts from, drawing from torch's default generator.

        Gates and the output start at zero, so every block starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith(("modulation.weight", "modulation_out.weight", "proj_out.weight")):
                nn.init.zeros_(weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> ClassDiTOutput | tuple[torch.Tensor]:
        """Predict the velocity (noise minus data) at a noise level.

        hidden_states is (B, C, H, W) with H = W = `sample_size`; timestep is (B,) or (), in
        [0, 1000] (1000 times sigma); class_labels is (B,), integers in [0, num_classes].
        Returns `.sample` (B, C, H, W), or a tuple of it. Rows do not influence each other.
        Raises ConfigError when the picture has another size.
        """
        self._check_picture(hidden_states)
        time = self.time_features(timestep.expand(hidden_states.shape[0])).to(hidden_states.dtype)
        condition_BM = self.time_embedding(time) + self.class_embedding(class_labels)
        condition_BM = nn.functional.silu(condition_BM)
        x_BNM = self.patches(hidden_states).flatten(2).transpose(1, 2) + self.position_NM
        for block in self.blocks:
            x_BNM = block(x_BNM, condition_BM)
        shift, scale = self.modulation_out(condition_BM).chunk(2, dim=1)
        sample = self._picture(self.proj_out(modulate(self.norm_out(x_BNM), shift, scale)))
        return ClassDiTOutput(sample=sample) if return_dict else (sample,)

    def _picture(self, x_BNP: torch.Tensor) -> torch.Tensor:
        """Tokens of p*p*C values each, back in their places: (B, C, H, W)."""
        p, channels = self.config.patch_size, self.config.in_channels
        grid = self.config.sample_size // p
        x = x_BNP.unflatten(2, (p, p, channels)).unflatten(1, (grid, grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check_picture(self, hidden_states: torch.Tensor) -> None:
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ConfigError(
                f"pictures of shape {tuple(hidden_states.shape[1:])} for a model of {expected}: "
                "the position table has one row per patch; pass latents of the model's shape"
            )


def _check_sizes(sample_size: int, patch_size: int, width: int, num_heads: int) -> None:
    if sample_size % patch_size:
        raise ConfigError(
            f"patch size {patch_size} does not divide sample size {sample_size}: every patch is "
            "whole; change one of the two"
        )
    if width % num_heads or width % 4:
        raise ConfigError(
            f"width {width} must be a multiple of {num_heads} heads and of 4: each head owns "
            "width / heads channels, each position axis a sine and a cosine half; change width"
        )
