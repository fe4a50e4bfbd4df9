"""Attention as a module that a plan can be bound to.

Shape legend: B batch, H query heads, G key/value heads, T query tokens on this rank, S key tokens
on this rank, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from stretto.errors import ConfigError

if TYPE_CHECKING:
    from stretto.mesh.mesh import Mesh
    from stretto.plan.options import Context


class Attention(nn.Module):
    """Softmax attention that `parallelize` can spread over ranks; on one rank, torch's own.

    Has no parameters: projections stay with the caller. While `mesh` is None the forward is torch
    SDPA over the whole sequence; once bound it is `stretto.attention`, and its inputs are this
    rank's tokens in the plan's layout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mesh: Mesh | None = None
        self.plan: Context | None = None

    def forward(
        self,
        q_BHTD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        *,
        causal: bool = False,
        window: int | None = None,
        documents: tuple[int, ...] | None = None,
        q_offset: int = 0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """(B, H, T, D) in the inputs' dtype; H is a multiple of G.

        Query i stands at key position i + q_offset. `window` counts the keys a query sees, itself
        included; `documents` are lengths that sum to the whole sequence. Scale D**-0.5 by default.
        """
        if self.mesh is not None:
            from stretto.ops.attention.dist import attention

            return attention(
                q_BHTD,
                k_BGSD,
                v_BGSD,
                mesh=self.mesh,
                plan=self.plan,
                causal=causal,
                window=window,
                documents=documents,
                q_offset=q_offset,
                scale=scale,
            )
        return _whole(q_BHTD, k_BGSD, v_BGSD, causal, window, documents, q_offset, scale)

    def extra_repr(self) -> str:
        return "" if self.mesh is None else f"rank {self.mesh.world_rank} of {self.plan}"


def _whole(q, k, v, causal, window, documents, q_offset, scale) -> torch.Tensor:
    """Attention over a whole sequence on one device, through torch SDPA."""
    if documents is not None:
        return _by_document(q, k, v, causal, window, documents, q_offset, scale)
    gqa = q.shape[1] != k.shape[1]
    plain = window is None and (not causal or (q_offset == 0 and q.shape[2] == k.shape[2]))
    mask = None if plain else visible(q.shape[2], k.shape[2], causal, window, q_offset, q.device)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and plain, scale=scale, enable_gqa=gqa
    )


def _by_document(q, k, v, causal, window, documents, q_offset, scale) -> torch.Tensor:
    """One call per document: no mask of the whole sequence is ever held."""
    tokens = q.shape[2]
    if q_offset or k.shape[2] != tokens or sum(documents) != tokens:
        raise ConfigError(
            f"documents of {sum(documents)} tokens in all, {tokens} queries and {k.shape[2]} keys "
            f"at offset {q_offset}: packed documents are self-attention, so the lengths sum to the "
            "queries and to the keys"
        )
    lengths = list(documents)
    cuts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    parts = [_whole(*cut, causal, window, None, 0, scale) for cut in cuts if cut[0].shape[2]]
    return torch.cat(parts, 2) if parts else q.clone()


def visible(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    q_offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(queries, keys) boolean: the keys each query sees; alone, a window looks both ways."""
    distance = (torch.arange(queries, device=device) + q_offset)[:, None] - torch.arange(
        keys, device=device
    )
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
        if not causal:
            seen &= -distance < window
    return seen
