"""Modules that call torch SDPA: a function mode, entered in the forward of the module that calls.

The scope lives in the module itself, so it is there again when `checkpoint` recomputes the module
in backward, where no mode that was entered around the model would be. A checkpoint *inside* the
module would recompute without it, and is refused in forward already.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stretto.errors import UnsupportedModel
from stretto.parallel.context import Binding

SDPA = functional.scaled_dot_product_attention
#: Fused kernels that attend without SDPA; on a shard they would see this rank's keys only.
_FUSED = {
    functional.multi_head_attention_forward: "torch.nn.MultiheadAttention",
    torch._native_multi_head_attention: "torch.nn.MultiheadAttention",
    torch._transformer_encoder_layer_fwd: "torch.nn.TransformerEncoderLayer",
}
#: Modules that mix tokens on their own, beside convolutions wider than one token.
_MIXING = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Fold,
    nn.Unfold,
    nn.Upsample,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


class SdpaScope(TorchFunctionMode):
    """While it is entered, torch SDPA runs over the mesh of a binding.

    `whole_keys`: keys and values are whole on every rank, as those of a text that only the queries
    of other tokens see; then SDPA stays as it is. Raises UnsupportedModel for what SDPA can do and
    a plan cannot: dense masks, dropout, fused kernels, a checkpoint between module and SDPA.
    """

    def __init__(self, binding: Binding, name: str, *, whole_keys: bool = False):
        super().__init__()
        self.binding = binding
        self.name = name
        self.whole_keys = whole_keys
        self.calls = 0

    def __enter__(self) -> SdpaScope:
        self._recorded = torch.is_grad_enabled()
        self._hooked = _checkpoint_hooks()
        return super().__enter__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func in _FUSED:
            raise UnsupportedModel(
                f"{self.name}: {_FUSED[func]} attends on its own\n"
                "  to fix: torch's scaled_dot_product_attention, or stretto's Attention module"
            )
        if func is not SDPA:
            return func(*args, **kwargs)
        self.calls += 1
        self._check_recomputed()
        if self.whole_keys:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ) -> torch.Tensor:
        if attn_mask is not None:
            raise UnsupportedModel(
                f"{self.name}: attn_mask of shape {tuple(attn_mask.shape)}: no rank holds the rows "
                "and columns of others\n  to fix: is_causal, or stretto's Attention module with "
                "window or documents; without padding, no mask"
            )
        if dropout_p:
            raise UnsupportedModel(
                f"{self.name}: attention dropout {dropout_p}: its mask would depend on the plan\n"
                "  to fix: dropout 0, or model.eval()"
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise UnsupportedModel(
                f"{self.name}: {query.shape[1]} query and {key.shape[1]} key heads without "
                "enable_gqa"
            )
        return self.binding.attend_sdpa(query, key, value, causal=is_causal, scale=scale)

    def _check_recomputed(self) -> None:
        """Refuse a checkpoint entered since the module: backward would recompute without us."""
        inside = _checkpoint_hooks() is not self._hooked
        silent = self._recorded and not torch.is_grad_enabled()
        if inside or silent:
            raise UnsupportedModel(
                f"{self.name}: a checkpoint between the module and its attention\n"
                "  why: backward would recompute the attention over this rank's keys only\n"
                "  to fix: checkpoint around the module"
            )


def _checkpoint_hooks() -> Any:
    """The hooks of the innermost checkpoint that is recording, None without one."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    ours = top is not None and top[0].__module__ == "torch.utils.checkpoint"
    return top[0] if ours else None


def callers(model: nn.Module) -> list[str]:
    """Names of the modules whose own forward calls torch SDPA."""
    return [name for name, part in model.named_modules() if calls_sdpa(type(part))]


def calls_sdpa(kind: type[nn.Module]) -> bool:
    """Whether a class's forward, or a function inside it, names SDPA."""
    forward = inspect.unwrap(kind.forward)
    queue = [forward.__code__] if inspect.isfunction(forward) else []
    while queue:
        code = queue.pop()
        if SDPA.__name__ in code.co_names:
            return True
        queue += [part for part in code.co_consts if inspect.iscode(part)]
    return False


def check(model: nn.Module, handled: Sequence[str] = ()) -> None:
    """Raise UnsupportedModel for a module that mixes tokens, unless its name is `handled`."""
    for name, part in model.named_modules():
        wide = isinstance(part, nn.modules.conv._ConvNd) and max(part.kernel_size) > 1
        if (wide or isinstance(part, _MIXING)) and name not in handled:
            raise UnsupportedModel(
                f"{name} ({type(part).__name__}) mixes tokens outside attention\n"
                "  why: on a shard it would miss the tokens of other ranks\n"
                "  to fix: bind the part of the model behind it, whose inputs are tokens"
            )


@contextlib.contextmanager
def scoped(
    part: nn.Module, name: str, binding: Binding, whole_keys: Callable[[tuple, dict], bool]
) -> Generator[None]:
    """This module's forward runs in a scope; `whole_keys(args, kwargs)` decides per call.

    Only the instance is changed, and a forward that somebody set on it before comes back.
    """
    before = part.__dict__.get("forward")
    if getattr(before, "_stretto", False):
        raise UnsupportedModel(f"{name} is bound to a plan already\n  to fix: undo that one first")
    inner = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with SdpaScope(binding, name, whole_keys=whole_keys(args, kwargs)) as scope:
            result = inner(*args, **kwargs)
        if not scope.calls:
            raise UnsupportedModel(
                f"{name} ({type(part).__name__}) attended without torch SDPA\n"
                "  why: it saw this rank's keys only"
            )
        return result

    forward._stretto = True  # pyrefly: ignore[missing-attribute]
    part.forward = forward
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before
