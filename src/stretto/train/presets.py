"""Models by name, and the task that a recipe means."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from stretto.errors import ConfigError
from stretto.train.dit import DitShape
from stretto.train.gpt import GptShape
from stretto.train.pictures import CHANNELS, PATCH
from stretto.train.recipe import Recipe
from stretto.train.tasks import Task, picture_task, text_task

_PATCH = CHANNELS * PATCH**2


@dataclass(frozen=True, slots=True)
class Preset:
    """A shape and the sequence it is meant for."""

    shape: GptShape | DitShape
    tokens: int


def _gpt(layers: int, width: int, heads: int, kv_heads: int, hidden: int) -> GptShape:
    return GptShape(layers=layers, width=width, heads=heads, kv_heads=kv_heads, hidden=hidden)


def _dit(layers: int, width: int, heads: int) -> DitShape:
    # The text embedding has a row per byte.
    return DitShape(layers=layers, width=width, heads=heads, patch=_PATCH, text=256)


#: Parameters: 0.9 M, 20 M, 0.3 G, 1.0 G, 7.0 G; 1.4 M, 50 M. The large ones have the sizes of
#: well-known models (GPT-2 medium, TinyLlama, Llama 3 8B) with bytes for tokens.
PRESETS = {
    "gpt-tiny": Preset(_gpt(4, 128, 4, 4, 352), 1024),
    "gpt-small": Preset(_gpt(8, 512, 8, 4, 1408), 4096),
    "gpt-medium": Preset(_gpt(24, 1024, 16, 8, 2752), 16384),
    "gpt-large": Preset(_gpt(22, 2048, 32, 4, 5632), 32768),
    "gpt-8b": Preset(_gpt(32, 4096, 32, 8, 14336), 65536),
    "dit-tiny": Preset(_dit(4, 128, 4), 256),
    "dit-small": Preset(_dit(12, 512, 8), 4096),
}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe. Raises ConfigError: unknown model, no config there, no text."""
    preset = PRESETS.get(recipe.model)
    if preset is None:
        if not Path(recipe.model).is_dir():
            raise ConfigError(_unknown(recipe.model))
        from stretto.train.huggingface import hugging_face_task

        return hugging_face_task(recipe)
    if isinstance(preset.shape, GptShape):
        return text_task(recipe, preset.shape)
    return picture_task(recipe, preset.shape)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"model {name!r} is no preset and no folder: there are {', '.join(PRESETS)}, or a folder "
        f"with a transformers config.json{hint}"
    )
