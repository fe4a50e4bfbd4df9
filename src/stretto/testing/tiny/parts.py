"""What every tiny pipeline shares: seeded weights, a scheduler by name, drawn inputs, small VAEs.

diffusers is imported inside functions, so that the registry can be read where it is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32 CPU tensor of `shape` from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def picture(seed: int, *shape: int) -> torch.Tensor:
    """Values in [0, 1], the range image processors expect of tensors."""
    return torch.rand(shape, generator=torch.Generator("cpu").manual_seed(seed))


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw weights from `seed` and leave the caller's random state as it was; also a decorator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make(name: str, **config):
    """A diffusers class by name, built from its configuration; models come in eval mode.

    Weights that the class starts at zero (ControlNet outputs, adaLN-zero gates) become random:
    with them left at zero the denoiser would ignore its input and a test could not fail.
    """
    import diffusers

    built = getattr(diffusers, name)(**config)
    if isinstance(built, torch.nn.Module):
        _fill_zero_weights(built)
        built.eval()
    return built


@torch.no_grad()
def _fill_zero_weights(module: torch.nn.Module) -> None:
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=0.1)


def assemble(name: str, **components):
    """A diffusers pipeline by name from ready components, on CPU, without progress bar.

    What its constructor asks for and is not given, encoders above all, is absent: inputs are ready
    embeddings.
    """
    import diffusers

    kind = getattr(diffusers, name)
    asked = list(inspect.signature(kind.__init__).parameters.values())[1:]
    absent = {p.name: None for p in asked if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    pipe = kind(**{**absent, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def masks(tokens: int) -> dict[str, torch.Tensor]:
    """Attention masks of both branches, (1, tokens); the negative one hides its last token."""
    mask = torch.ones(1, tokens, dtype=torch.long)
    shorter = mask.clone()
    shorter[:, -1] = 0
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": shorter}


def image_vae(latent_channels: int = 4, **config):
    """AutoencoderKL that halves height and width once."""
    return make(
        "AutoencoderKL",
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=latent_channels,
        **config,
    )
