"""Models of transformers: one stateless attention function, mesh and plan on each layer.

The function is registered under the name `stretto` beside transformers' own; a model uses it while
its configuration says so, which is what binding sets and undoing restores. A hook at the model's
entrance refuses inputs that would be right on one rank and wrong on a shard.
Source: transformers 5.24, AttentionInterface and AttentionMaskInterface.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from stretto.errors import UnsupportedModel
from stretto.mesh.local import LocalWorld
from stretto.parallel.context import Binding
from stretto.parallel.layouts.masks import Visible, refuse_padding, visible
from stretto.plan.context import Context

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "stretto"
#: Attribute of a bound layer.
SEAT = "_stretto_binding"

#: What layers and callers pass to an attention function without asking it for anything else.
#: `sliding_window` and `is_causal` repeat the mask; where there is no mask they are read.
HARMLESS = frozenset(
    [
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "is_causal",
        "sliding_window",
        "documents",
        "num_items_in_batch",
        "shift_labels",
        "logits_to_keep",
        "layer_idx",
        "output_hidden_states",
        "return_dict",
        "deterministic",
        "cache",
        "past_key_values",
        "token_type_ids",
        "mm_token_type_ids",
    ]
)


def is_model(model: nn.Module) -> bool:
    """Whether this is a model of transformers; asks without importing the library."""
    return any(
        kind.__module__ == "transformers.modeling_utils" and kind.__name__ == "PreTrainedModel"
        for kind in type(model).__mro__
    )


def attend(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: (B, T, H, D) and no weights.

    A layer without a binding, whose model shares its configuration with a bound one, computes on
    its own. Raises UnsupportedModel for dropout, dense masks and options that are no plain softmax.
    """
    binding: Binding = module.__dict__.get(SEAT) or _alone()
    seen = _seen(module, attention_mask, options)
    sinks = options.pop("s_aux", None)
    _refuse(module, dropout, options)
    documents = _documents(binding, options)
    if binding.watch is not None:
        out = binding.watch.attend(module, query_BHTD, key_BGTD, value_BGTD)
        return out.transpose(1, 2).contiguous(), None
    queries, keys = query_BHTD.shape[2], key_BGTD.shape[2]
    if queries != keys:
        raise UnsupportedModel(
            f"{type(module).__name__}: {queries} queries on {keys} keys of another sequence or of "
            "a cache, which no plan has split"
        )
    mask = {"causal": seen.causal, "window": seen.window, "scale": scaling, "sinks": sinks}
    mask["documents"] = _with_chunks(seen, documents, binding.call.get("tokens", keys))
    out = binding.attend(query_BHTD, key_BGTD, value_BGTD, **mask)
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _alone() -> Binding:
    """For layers that no plan is bound to: one rank."""
    return Binding(LocalWorld({}).mesh(0), Context())


def _seen(module: nn.Module, attention_mask: Any, options: dict[str, Any]) -> Visible:
    """The layer's mask: what our mask function gave, or without one the layer's own word."""
    if isinstance(attention_mask, Visible):
        return attention_mask
    refuse_padding(attention_mask)
    if options.get("sliding_window") is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for a window of {options['sliding_window']} without "
            "a mask that says so: torch SDPA would ignore it, flash attention would not"
        )
    causal = options.get("is_causal")
    return Visible(causal=getattr(module, "is_causal", True) if causal is None else causal)


def _refuse(module: nn.Module, dropout: float, options: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise UnsupportedModel(
            f"{name}: attention dropout {dropout}: its random mask would depend on the plan\n"
            "  to fix: attention_dropout=0 in the configuration, or model.eval()"
        )
    asked = [key for key, value in options.items() if key not in HARMLESS and _says(value)]
    if asked:
        raise UnsupportedModel(
            f"{name} passes {', '.join(sorted(asked))} to its attention: more than a softmax over "
            "a range of keys, which is all that a plan splits exactly"
        )


def _says(value: Any) -> bool:
    """Whether an option asks for something: None, False and empty containers do not."""
    return value is not None and value is not False and not (isinstance(value, tuple) and not value)


def _documents(binding: Binding, options: dict[str, Any]) -> tuple[int, ...] | None:
    documents = options.get("documents")
    if documents is None and binding.call.get("documents") is not None:
        raise UnsupportedModel(
            "the model takes documents but does not hand them to its attention layers, so packed "
            "sequences would see one another\n  to fix: one sequence per row, without documents"
        )
    return documents


def _with_chunks(
    seen: Visible, documents: tuple[int, ...] | None, tokens: int
) -> tuple[int, ...] | None:
    """Documents of this layer; chunks are documents, of the whole sequence's length."""
    if seen.chunk is None:
        return documents
    if documents is not None:
        raise UnsupportedModel("chunked attention inside packed documents: pass one sequence")
    return seen.documents(tokens)


def register() -> None:
    """Make the name known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible)


def check(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for what its classes and configuration already tell."""
    for part in _models(model):
        if not part._can_set_attn_implementation():
            raise UnsupportedModel(
                f"{type(part).__name__} attends outside transformers' attention interface\n"
                "  why: its layers would see this rank's keys only"
            )
    for name, part in model.named_modules():
        kinds = getattr(part, "rope_type", None) or ()
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind == "longrope" or "dynamic" in kind:
                raise UnsupportedModel(
                    f"{name}: rotary frequencies of kind {kind} depend on the longest position "
                    "that a rank holds, so ranks would rotate differently"
                )
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModel(f"{name}: batch statistics over this rank's tokens only")


@contextlib.contextmanager
def bound(model: PreTrainedModel, binding: Binding) -> Generator[None]:
    """The model's layers attend through the binding; afterwards everything is as before."""
    register()
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    layers = [part for part in model.modules() if part is not model]
    taken = [part for part in layers if SEAT in part.__dict__]
    if taken:
        raise UnsupportedModel(
            f"{type(model).__name__} is bound to a plan already ({len(taken)} modules)\n"
            "  to fix: undo that one first, or bind a copy of the model"
        )
    try:
        for part in layers:
            part.__dict__[SEAT] = binding
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for part in layers:
            part.__dict__.pop(SEAT, None)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if is_model(part)]


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every configuration object that a layer may ask, each once."""
    found: dict[int, PretrainedConfig] = {}
    queue = [part.config for part in model.modules() if _has_config(part)]
    while queue:
        config = queue.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            queue.extend(part for part in parts if part is not None)
    return list(found.values())


def _has_config(part: nn.Module) -> bool:
    return hasattr(getattr(part, "config", None), "_attn_implementation_internal")


def parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Named arguments of the model's forward."""
    return dict(inspect.signature(model.forward).parameters)


def position_tables(model: nn.Module) -> list[nn.Module]:
    """Modules that look positions up, in families whose own forward is not told any.

    Decoders of sequence-to-sequence families count from 0 and hand that to such a module.
    """
    return [
        part
        for part in model.modules()
        if type(part).__name__.endswith("PositionalEmbedding")
        and "position_ids" in inspect.signature(part.forward).parameters
    ]


def told(part: nn.Module, binding: Binding) -> RemovableHandle:
    """The module looks up the positions of this call, whatever its caller counted."""

    def tell(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        positions = binding.call.get("position_ids")
        if positions is None:
            return args, kwargs
        if len(positions) > 1:
            raise UnsupportedModel(
                f"position_ids of shape {tuple(positions.shape)}: {type(module).__name__} takes "
                "one row for all sequences of a batch"
            )
        return args, {**kwargs, "position_ids": positions[0]}

    return part.register_forward_pre_hook(tell, with_kwargs=True)
