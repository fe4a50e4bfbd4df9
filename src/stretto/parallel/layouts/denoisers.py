"""Transformers of diffusers: their `_cp_plan`, read as data, says what is cut and gathered where.

Inputs and outputs of the model stay whole; inside, tensors named by the plan are this rank's share
in order (contiguous), and attention modules run in a scope over the mesh. Gradients of parameters
are this rank's share: sum them over ranks, with the same loss computed on every rank.
Source: diffusers 0.42, `ContextParallelInput` and `ContextParallelOutput`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stretto.errors import UnsupportedModel
from stretto.mesh.mesh import Mesh
from stretto.parallel import sdpa
from stretto.parallel.context import Binding
from stretto.plan.ranges import shard

TEXT = "encoder_hidden_states"

#: Classes whose plans were compared with one rank, forward and gradients. Others may leave tokens
#: of a second kind whole on every rank, whose gradients would then be counted several times.
COMPARED = frozenset(
    {
        "ChronoEditTransformer3DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "LTXVideoTransformer3DModel",
        "QwenImageTransformer2DModel",
        "WanTransformer3DModel",
    }
)


def is_model(model: nn.Module) -> bool:
    """Whether this is a model of diffusers; asks without importing the library."""
    return any(
        kind.__module__.startswith("diffusers.models") and kind.__name__ == "ModelMixin"
        for kind in type(model).__mro__
    )


def bind(
    model: nn.Module, binding: Binding, stack: contextlib.ExitStack, *, check: bool
) -> list[str]:
    """Hook the model as its plan says; names of the bound attention modules.

    Raises UnsupportedModel without a plan, for a class that was never compared with one rank (if
    `check`), and for mixing modules inside the repeated blocks.
    """
    name, plan = type(model).__name__, getattr(model, "_cp_plan", None)
    if not plan:
        raise UnsupportedModel(
            f"{name} has no _cp_plan\n  why: nothing says which of its tensors are tokens, and "
            "where they may be cut"
        )
    if check and name not in COMPARED:
        raise UnsupportedModel(
            f"{name}: its _cp_plan was never compared with one rank; compared are "
            f"{', '.join(sorted(COMPARED))}\n  to fix: compare it, then pass check=False"
        )
    blocks = [part for part in model.children() if isinstance(part, nn.ModuleList)]
    for part in blocks:
        sdpa.check(part)
    cut_names = {name for entry in plan.values() if isinstance(entry, Mapping) for name in entry}
    binding.causal, binding.cross = False, TEXT in cut_names
    for place, entry in plan.items():
        for name, part in _places(model, place):
            _hook(part, name, entry, binding.mesh, stack)
    names = [name for name, part in model.named_modules() if hasattr(part, "set_processor")]
    names = [name for name in names if name]
    for name in names:
        part = model.get_submodule(name)
        whole = _text_keys(part) if TEXT not in cut_names else lambda args, kwargs: False
        stack.enter_context(sdpa.scoped(part, name, binding, whole))
    return names


def _places(model: nn.Module, place: str) -> list[tuple[str, nn.Module]]:
    """Modules that an entry of the plan names; `*` stands for every item of a list."""
    found = [("", model)]
    for step in place.split(".") if place else ():
        found = [
            (f"{path}.{name}".lstrip("."), part)
            for path, parent in found
            for name, part in parent.named_children()
            if step in ("*", name)
        ]
    return found


def _hook(part: nn.Module, name: str, entry: Any, mesh: Mesh, stack) -> None:
    if isinstance(entry, Mapping):
        inputs = {key: cut for key, cut in entry.items() if not _of_output(cut)}
        outputs = {key: cut for key, cut in entry.items() if _of_output(cut)}
        if inputs:
            signature = inspect.signature(part.forward)
            before = functools.partial(_cut_inputs, inputs, signature, mesh)
            stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
        if outputs:
            after = functools.partial(_cut_outputs, outputs, name, mesh)
            stack.callback(part.register_forward_hook(after).remove)
        return
    gathers = entry if isinstance(entry, list | tuple) else [entry]
    after = functools.partial(_gather_outputs, gathers, name, mesh)
    stack.callback(part.register_forward_hook(after).remove)


def _of_output(cut: Any) -> bool:
    return not isinstance(cut, list | tuple) and cut.split_output


def _cut_inputs(cuts: Mapping[str, Any], signature, mesh, part, args, kwargs):
    named = signature.bind(*args, **kwargs).arguments
    extra = named.pop("kwargs", {})
    for name, cut in cuts.items():
        if named.get(name) is not None:
            named[name] = _cut_any(named[name], cut, mesh)
    return (), {**named, **extra}


def _cut_any(value: Any, cut: Any, mesh: Mesh) -> Any:
    """A tensor, or tensors beside one entry each."""
    if isinstance(value, torch.Tensor):
        return _cut(value, cut, mesh)
    entries = cut if isinstance(cut, list | tuple) else [cut] * len(value)
    return tuple(_cut(each, entry, mesh) for each, entry in zip(value, entries, strict=True))


def _cut(value: torch.Tensor, cut: Any, mesh: Mesh) -> torch.Tensor:
    """This rank's share; tensors of another rank than the plan expects stay, as in diffusers."""
    if cut.expected_dims is not None and value.dim() != cut.expected_dims:
        return value
    parts = mesh.size("cp")
    own = shard("contiguous", value.shape[cut.split_dim], parts)[mesh.rank("cp")]
    start, end = own.hull if own else (0, 0)
    return value.narrow(cut.split_dim, start, end - start)


def _cut_outputs(cuts: Mapping[int, Any], name, mesh, part, args, output):
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    for place, cut in cuts.items():
        outputs[place] = _cut(outputs[place], cut, mesh)
    return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)


def _gather_outputs(gathers, name, mesh, part, args, output):
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    if len(outputs) != len(gathers):
        raise UnsupportedModel(f"{name}: {len(outputs)} outputs, its _cp_plan has {len(gathers)}")
    for place, gather in enumerate(gathers):
        if gather is not None:
            outputs[place] = _Gather.apply(outputs[place], gather.gather_dim, mesh)
    return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)


class _Gather(torch.autograd.Function):
    """Shares joined along a dim. Every rank computes the same loss of the whole, so the gradient of
    its own share is its rows of the whole gradient.
    """

    @staticmethod
    def forward(ctx, own: torch.Tensor, dim: int, mesh: Mesh) -> torch.Tensor:
        rows = torch.tensor([own.shape[dim]])
        counts = [int(n) for n in mesh.all_gather(rows, "cp", "control").wait()]
        ctx.dim, ctx.start, ctx.rows = dim, sum(counts[: mesh.rank("cp")]), own.shape[dim]
        padded = own.movedim(dim, 0).contiguous()
        if padded.shape[0] < max(counts):
            filled = padded.new_zeros(max(counts), *padded.shape[1:])
            filled[: padded.shape[0]] = padded
            padded = filled
        parts = mesh.all_gather(padded, "cp", "gather").wait()
        joined = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return joined.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx, whole: torch.Tensor):  # pyrefly: ignore[bad-override]
        return whole.narrow(ctx.dim, ctx.start, ctx.rows), None, None


def _text_keys(part: nn.Module) -> Callable[[tuple, dict], bool]:
    """Whether a call's keys come from text that is whole on every rank."""
    names = list(inspect.signature(part.forward).parameters)
    place = names.index(TEXT) if TEXT in names else None

    def whole(args: tuple, kwargs: dict) -> bool:
        if TEXT in kwargs:
            return kwargs[TEXT] is not None
        return place is not None and place < len(args) and args[place] is not None

    return whole
