"""What stretto knows of pipeline classes, as data: a new family is an entry, never code."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch

from stretto.errors import UnsupportedPipeline

#: Component names that hold a denoiser in diffusers' own pipelines.
DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
#: Networks that run beside the denoiser at every step; they follow its schedule, uncut.
SIDE_NETWORKS = ("controlnet",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about a pipeline class.

    `checked`: cutting the denoiser's batch was verified by the tests. `never_split`: argument
    names without a batch. `refused`: why windows of several steps would be wrong, if they would.
    """

    checked: bool = False
    never_split: frozenset[str] = field(default_factory=frozenset)
    refused: str = ""


_CHECKED = Family(checked=True)

FAMILIES: dict[str, Family] = {
    "AudioLDM2Pipeline": _CHECKED,
    "ClassDiTPipeline": _CHECKED,
    "ClassUNetPipeline": _CHECKED,
    "CogVideoXPipeline": _CHECKED,
    "LattePipeline": _CHECKED,
    "StableDiffusion3Pipeline": _CHECKED,
    "StableDiffusionPipeline": _CHECKED,
    "StableDiffusionXLPipeline": _CHECKED,
    "StableVideoDiffusionPipeline": _CHECKED,
    "AceStepPipeline": Family(refused="its guidance keeps a momentum that guesses would disturb"),
}


def family_of(pipe: Any) -> Family:
    return FAMILIES.get(type(pipe).__name__, Family())


def denoisers_of(pipe: Any, name: str | None = None) -> dict[str, torch.nn.Module]:
    """The modules to hook, by component name. Raises UnsupportedPipeline with what was seen."""
    modules = {
        key: value for key, value in vars(pipe).items() if isinstance(value, torch.nn.Module)
    }
    if name is not None:
        if name in modules:
            return {name: modules[name]}
        near = difflib.get_close_matches(name, modules, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnsupportedPipeline(
            f"denoiser {name!r} is no module of {type(pipe).__name__}; "
            f"its modules are {', '.join(sorted(modules))}{hint}"
        )
    found = {key: modules[key] for key in (*DENOISERS, *SIDE_NETWORKS) if key in modules}
    if not set(found) & set(DENOISERS):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} has no denoiser that stretto recognises: looked for "
            f"{', '.join(DENOISERS)} among {', '.join(sorted(modules)) or 'no modules'}; "
            'pass denoiser="name of the module"'
        )
    return found
