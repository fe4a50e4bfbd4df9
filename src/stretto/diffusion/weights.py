"""Do all ranks hold the same weights? A hash of some elements of their parameters tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from stretto.diffusion.exchange import digest
from stretto.diffusion.inputs import refuse_unlike
from stretto.mesh.mesh import Mesh

#: How many parameters are read, and elements along each of their dimensions. Two trainings part in
#: all elements; to read all parameters of a large model takes 0.1 s.
_PARAMETERS, _ELEMENTS = 128, 4


def check_weights(mesh: Mesh, modules: Mapping[str, Module]) -> None:
    """Raise RanksDisagree, on every rank, where two ranks hold unlike denoisers.

    Weights that are sharded, quantised in a class of their own or on their way between memories
    are not compared.
    """
    if mesh.world_size == 1:
        return
    hashes = {f"weights of {name} (hash)": hash_of(module) for name, module in modules.items()}
    refuse_unlike(
        mesh,
        {"denoisers": ", ".join(modules), **{k: found for k, found in hashes.items() if found}},
        why="one generation would be made of two models' steps",
        to_fix="load the same files and adapters on every rank; where weights are drawn, call "
        "torch.manual_seed first",
    )


def hash_of(module: Module) -> str | None:
    """Of the names and forms of all parameters, and of some elements; None if unreadable."""
    parameters = dict(module.named_parameters())
    chosen = list(parameters.values())[:: -(-len(parameters) // _PARAMETERS) or 1]
    if _is_group_offloaded(module) or not all(map(_is_readable, chosen)):
        return None
    forms = [(name, str(p.dtype), tuple(p.shape)) for name, p in parameters.items()]
    written = torch.frombuffer(bytearray(repr(forms).encode()), dtype=torch.uint8)
    return digest(written, *map(_sample, chosen)).hex()


def _is_readable(parameter: Parameter) -> bool:
    plain = type(parameter.data) in (Tensor, Parameter) and parameter.device.type != "meta"
    # A sharded parameter gives its memory back between calls.
    return plain and parameter.untyped_storage().size() >= parameter.element_size()


def _is_group_offloaded(module: Module) -> bool:
    """diffusers leaves memory without values behind, where it offloads to a disk."""
    registries: list[Any] = [vars(part).get("_diffusers_hook") for part in module.modules()]
    return any(each is not None and each.get_hook("group_offloading") for each in registries)


def _sample(parameter: Parameter) -> Tensor:
    """Some elements of a parameter by their places, whatever its layout in memory."""
    strides = [max(1, -(-size // _ELEMENTS)) for size in parameter.shape]
    return parameter.detach()[tuple(slice(None, None, stride) for stride in strides)]
