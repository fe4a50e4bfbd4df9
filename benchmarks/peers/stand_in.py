"""The two private entry points of flash-attn that peers call, on torch's CPU kernel.

Tensors are (batch, rows, heads, head dim) as in flash-attn; the log-sum-exp is (batch, heads,
rows) in float32. Peers ask for parameters by name, so these are flash-attn's; only what the
comparison needs is there: no dropout, window, softcap, bias.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_ATEN = torch.ops.aten


def forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    """out, lse, and two values that nobody reads: the result of flash-attn since 2.7."""
    _refuse(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        *heads, 0.0, causal, scale=softmax_scale
    )
    return out.transpose(1, 2), lse.contiguous(), None, None


def backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    """Write the gradients into dq, dk, dv."""
    _refuse(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    heads = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, softmax_lse, 0.0, causal, scale=softmax_scale
    )
    for into, gradient in zip((dq, dk, dv), found, strict=True):
        into.copy_(gradient.transpose(1, 2))


def _refuse(dropout_p, window_size, softcap, alibi_slopes) -> None:
    if dropout_p or tuple(window_size) != (-1, -1) or softcap or alibi_slopes is not None:
        raise NotImplementedError(
            f"the stand-in for flash-attn has no dropout ({dropout_p}), window {window_size}, "
            f"softcap ({softcap}) or bias"
        )


def absent(*_args, **_options):
    """For names that peers import and this comparison does not call."""
    raise NotImplementedError("the stand-in for flash-attn has attention of equal lengths only")


def provide() -> None:
    """Let `import flash_attn` find the stand-in, in this process."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = "2.8.3"
    package.__path__ = []
    package.flash_attn_func = absent
    package.flash_attn_interface = interface
    interface._flash_attn_forward = forward
    interface._flash_attn_backward = backward
    interface._flash_attn_varlen_forward = absent
    interface._flash_attn_varlen_backward = absent
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
