"""Do all ranks hold the same weights? A hash of some elements of their parameters tells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from stretto.diffusion.exchange import digest
from stretto.errors import RanksDisagree
from stretto.mesh.mesh import Mesh

#: How many parameters are read, and elements along each of their dimensions. Two trainings part in
#: all elements; to read all parameters of a large model takes 0.1 s.
_PARAMETERS, _ELEMENTS = 128, 4
#: In place of a hash where weights cannot be read: they are not compared.
_UNKNOWN = "unknown"


def check_weights(mesh: Mesh, modules: Mapping[str, Module]) -> None:
    """Raise RanksDisagree, on every rank, where two ranks hold unlike denoisers.

    Weights that are sharded, quantised in a class of their own or on their way between memories
    are not compared.
    """
    if mesh.world_size == 1:
        return
    own = {name: hash_of(module) for name, module in modules.items()}
    seen = [json.loads(each) for each in mesh.gather_bytes(json.dumps(own).encode())]
    for name in sorted(set().union(*seen)):
        _refuse_unlike(name, [each.get(name, "none") for each in seen])


def hash_of(module: Module) -> str:
    """Of the names and forms of all parameters, and of what some elements are."""
    parameters = dict(module.named_parameters())
    chosen = list(parameters.values())[:: -(-len(parameters) // _PARAMETERS) or 1]
    if _is_group_offloaded(module) or not all(map(_is_readable, chosen)):
        return _UNKNOWN
    forms = [(name, str(p.dtype), tuple(p.shape)) for name, p in parameters.items()]
    written = torch.frombuffer(bytearray(repr(forms).encode()), dtype=torch.uint8)
    return digest(written, *map(_sample, chosen)).hex()


def _refuse_unlike(name: str, hashes: Sequence[str]) -> None:
    firsts = {seen: hashes.index(seen) for seen in hashes if seen != _UNKNOWN}
    if len(firsts) > 1:
        (one, first), (other, second) = list(firsts.items())[:2]
        raise RanksDisagree(
            f"{name}: rank {first} has weights {one[:8]}, rank {second} {other[:8]} (hash of some "
            "elements of the parameters)\n"
            "  why: one generation would be made of two models' steps\n"
            "  to fix: load the same files and adapters on every rank; where weights are drawn, "
            "call torch.manual_seed first"
        )


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
