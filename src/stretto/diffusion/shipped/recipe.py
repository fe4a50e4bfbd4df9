"""What decides the weights of a shipped model, and the untrained pipeline it describes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from stretto.diffusion.shipped.dit import ClassDiT
from stretto.diffusion.shipped.pipeline import ClassDiTPipeline, ClassPipeline, ClassUNetPipeline
from stretto.errors import ConfigError

NUM_CLASSES = 10
SHIFT = 3.0  # Sampling shift of Stable Diffusion 3 (2403.03206, section 5.3.2).
DIT_ONLY = ("width", "layers", "heads")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the machine."""

    model: str = "dit"
    data: str = "fashion"
    steps: int = 20000
    batch: int = 256
    seed: int = 0
    width: int = 128
    layers: int = 6
    heads: int = 4
    lr: float | None = None
    flip: bool = False
    compile: bool = False
    graph: bool = False

    @property
    def learning_rate(self) -> float:
        """Peak rate: as given, else 1e-3 at width 128, falling with the width above it."""
        return self.lr if self.lr is not None else 1e-3 * min(1.0, 128 / self.width)

    def command(self) -> str:
        """The command that repeats this recipe, without the paths of one machine."""
        words = ["python -m stretto.diffusion.shipped.train"]
        for name, value in asdict(self).items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words.append(f"--{name} {value}")
        return " ".join(words)


def build(recipe: Recipe, size: int) -> ClassPipeline:
    """An untrained pipeline for pictures of size x size; the weights depend on the seed only."""
    if min(recipe.steps, recipe.batch) < 1:
        raise ConfigError(f"{recipe.steps} steps of batch {recipe.batch}: both must be 1 or more")
    with torch.random.fork_rng(devices=[]):
        # Weights are drawn on the host; other devices need not wake for it.
        torch.default_generator.manual_seed(recipe.seed)
        if recipe.model == "dit":
            return _dit(recipe, size)
        if recipe.model == "unet":
            return _unet(recipe, size)
    raise ConfigError(f"no model {recipe.model!r}: choose dit or unet")


def _dit(recipe: Recipe, size: int) -> ClassDiTPipeline:
    transformer = ClassDiT(
        sample_size=size,
        width=recipe.width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        num_classes=NUM_CLASSES,
    )
    transformer.initialize()
    return ClassDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=SHIFT))


def _unet(recipe: Recipe, size: int) -> ClassUNetPipeline:
    changed = [f for f in DIT_ONLY if getattr(recipe, f) != getattr(Recipe, f)]
    if changed:
        raise ConfigError(
            f"--{', --'.join(changed)} with --model unet: its size is fixed at 0.57 M parameters, "
            "so that it ships in 1.2 MB; leave these out or take --model dit"
        )
    unet = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=NUM_CLASSES + 1,
    )
    # Clipping would put a kink into the trajectory that step-parallel prediction extrapolates.
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return ClassUNetPipeline(unet, scheduler)
