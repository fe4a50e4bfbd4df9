"""Attention that a plan can be bound to, and the binding itself.

Shape legend: B batch, H query heads, G key/value heads, T query tokens on this rank, S key tokens
on this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from stretto.errors import ConfigError, PlanMismatch, ShapeError, UnsupportedModel
from stretto.mesh.mesh import Mesh
from stretto.plan.context import Context, settled
from stretto.plan.ranges import Mask, Spans, packed, shard

#: Queries that attend at a time where there is a window, unless it is longer.
_BLOCK = 1024


def _even(rows: tuple[int, ...]) -> bool:
    shares = shard("contiguous", sum(rows), len(rows))
    return rows == tuple(share.rows for share in shares)


def _in_order(rows: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Ranges of ranks that hold so many rows, one rank after the other."""
    ends = list(accumulate(rows))
    return tuple(((end - own, end),) if own else () for own, end in zip(rows, ends, strict=True))


def own_rows(tokens: int, mesh: Mesh, plan: Context, mask: Mask) -> Spans:
    """The positions of this rank, out of `tokens`, in a model bound to `plan`.

    Raises PlanMismatch where the plan is over other ranks than the mesh's cp axis.
    """
    check_degree(plan, mesh)
    context = settled(plan, causal=mask.causal, documents=mask.documents)
    return shard(context.layout, tokens, context.degree, mask)[mesh.rank("cp")]


def check_degree(plan: Context, mesh: Mesh) -> None:
    """Raise PlanMismatch unless the plan is over as many ranks as the mesh's cp axis has.

    ConfigError for what is no mesh.
    """
    if not isinstance(mesh, Mesh):
        raise ConfigError(
            f"mesh={mesh!r} is a {type(mesh).__name__}, no Mesh\n"
            f"  why: the {plan.degree} rank(s) of {plan.short()} meet on it\n"
            "  to fix: mesh=stretto.init_mesh(plan), on one rank too"
        )
    if mesh.size("cp") != plan.degree:
        raise PlanMismatch(
            f"{plan.short()} is over {plan.degree} ranks, the mesh's cp axis has "
            f"{mesh.size('cp')}\n  to fix: init_mesh(plan) of the same plan"
        )


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the dtype of an active autocast, as SDPA casts them; float64 stays.

    Rotated queries and keys are often float32 beside lower values.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    lower = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(lower) for x in tensors)


@dataclass(eq=False)
class Binding:
    """What `parallelize` leaves on a model's attention modules: where they run and how.

    `causal`: how an `auto` layout is decided. `call`: what this call of the model said about
    itself, filled by the hook at its entrance: `documents`, and `tokens` of all ranks. `cross`:
    keys of another length are shards too. `watch`: while the model is being examined, what takes
    the place of attention.
    """

    mesh: Mesh
    plan: Context
    causal: bool = True
    cross: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    watch: Any = None

    def __deepcopy__(self, memo: dict) -> Binding:
        """A copy of a bound model is bound to the same mesh: process groups cannot be copied."""
        return self

    def attend(
        self, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, **mask: Any
    ) -> torch.Tensor:
        """`stretto.attention` over all shards; values may have another head dim than keys."""
        from stretto.ops.attention.dist import attention

        plan = mask.pop("plan", None)
        if plan is None:
            plan = settled(self.plan, causal=self.causal, documents=self.call.get("documents"))
        q_BHTD, k_BGSD, v_BGSE = _autocast(q_BHTD, k_BGSD, v_BGSE)
        dims = q_BHTD.shape[-1], v_BGSE.shape[-1]
        if dims[0] != dims[1]:
            # Zeros change neither scores nor outputs, and the output's extra columns are zero.
            if mask.get("scale") is None:
                mask["scale"] = dims[0] ** -0.5
            q_BHTD, k_BGSD, v_BGSE = (
                functional.pad(x, (0, max(dims) - x.shape[-1])) for x in (q_BHTD, k_BGSD, v_BGSE)
            )
        mask.setdefault("tokens", self.call.get("tokens"))
        out = attention(q_BHTD, k_BGSD, v_BGSE, mesh=self.mesh, plan=plan, **mask)
        return out[..., : dims[1]]

    def attend_sdpa(
        self, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, *, causal, scale
    ) -> torch.Tensor:
        """The same for a caller of torch SDPA, which says nothing of the whole sequence.

        Without a causal mask any distribution of rows is right, so uneven ones (tokens of two kinds
        that were cut apart) are taken as they are. Raises UnsupportedModel for keys in another
        number than queries, unless both are cut evenly.
        """
        if causal:
            plan = settled(self.plan, causal=True)
            return self.attend(q_BHTD, k_BGSD, v_BGSE, plan=plan, causal=True, scale=scale)
        own = torch.tensor([q_BHTD.shape[2], k_BGSD.shape[2]])
        counts = [row.tolist() for row in self.mesh.all_gather(own, "cp", "control").wait()]
        q_rows, k_rows = (tuple(rows) for rows in zip(*counts, strict=True))
        layout = _in_order(q_rows)
        if q_rows != k_rows:
            if not (self.cross and _even(q_rows) and _even(k_rows)):
                raise UnsupportedModel(
                    f"{q_rows} queries and {k_rows} keys per rank: nothing tells whether the keys "
                    "are shards or whole on every rank\n  to fix: stretto's Attention module, or "
                    "keys and queries of one sequence"
                )
            layout = "contiguous"
        plan = replace(self.plan, layout=layout)
        tokens = sum(q_rows), sum(k_rows)
        return self.attend(q_BHTD, k_BGSD, v_BGSE, plan=plan, tokens=tokens, scale=scale)


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
        documents = packed(documents)
        mask = {"causal": causal, "window": window, "documents": documents, "q_offset": q_offset}
        if self.mesh is None:
            return whole(q_BHTD, k_BGSD, v_BGSD, **mask, scale=scale)
        from stretto.ops.attention.dist import attention

        plan = settled(self.plan or Context(), causal=causal, documents=documents)
        # Packed documents are self-attention, so nobody needs to be asked for lengths.
        tokens = None if documents is None or q_offset else sum(documents)
        inputs = _autocast(q_BHTD, k_BGSD, v_BGSD)
        return attention(*inputs, mesh=self.mesh, plan=plan, tokens=tokens, **mask, scale=scale)

    def release(self) -> None:
        """Back to one rank."""
        self.mesh = self.plan = None

    def extra_repr(self) -> str:
        return "" if self.mesh is None else f"rank {self.mesh.world_rank} of {self.plan}"


def whole(
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
    """Attention over a whole sequence on one device, through torch SDPA.

    Documents become one call each, and a window one for each block of queries, so no mask of the
    whole sequence is held.
    Raises ShapeError for a window below 1 and documents that do not sum to the queries and keys.
    """
    Mask(causal=causal, window=window, q_offset=q_offset, documents=documents)  # or ShapeError
    mask = {"causal": causal, "window": window, "scale": scale}
    tokens, keys = q_BHTD.shape[2], k_BGSD.shape[2]
    if documents is None:
        return _sdpa(q_BHTD, k_BGSD, v_BGSD, q_offset=q_offset, **mask)
    if q_offset or keys != tokens or sum(documents) != tokens:
        raise ShapeError(
            f"documents of {sum(documents)} tokens in all, {tokens} queries and {keys} keys at "
            f"offset {q_offset}: packed documents are self-attention, so the lengths sum to the "
            "queries and to the keys"
        )
    cuts = zip(*(x.split(list(documents), 2) for x in (q_BHTD, k_BGSD, v_BGSD)), strict=True)
    parts = [_sdpa(*cut, **mask) for cut in cuts if cut[0].shape[2]]
    return torch.cat(parts, 2) if parts else q_BHTD.clone()


def _sdpa(q, k, v, *, causal, window, scale, q_offset=0) -> torch.Tensor:
    rows, queries, keys = max(_BLOCK, window or 0), q.shape[2], k.shape[2]
    if window is None or queries <= rows or not keys:
        return _attend(q, k, v, causal=causal, window=window, scale=scale, q_offset=q_offset)
    # Cut first: the gradient of a slice of all keys would be as long as they are, for every block.
    k_parts, v_parts = k.split(rows, 2), v.split(rows, 2)
    found = []
    for start, q_part in zip(range(0, queries, rows), q.split(rows, 2), strict=True):
        first = start + q_offset
        beyond = 0 if causal else window - 1
        # One key at least, also for queries that see none.
        low = min(max(first - window + 1, 0), keys - 1)
        high = max(min(first + q_part.shape[2] + beyond, keys), low + 1)
        near = (_between(parts, rows, low, high) for parts in (k_parts, v_parts))
        mask = {"causal": causal, "window": window, "q_offset": first - low}
        found.append(_attend(q_part, *near, scale=scale, **mask))
    return torch.cat(found, 2)


def _between(parts: Sequence[torch.Tensor], rows: int, low: int, high: int) -> torch.Tensor:
    """Rows `low` to `high` of what was split into parts of `rows` along dim 2."""
    cuts = []
    for index in range(low // rows, -(-high // rows)):
        start = index * rows
        cuts.append(parts[index][:, :, max(low - start, 0) : high - start])
    return torch.cat(cuts, 2) if len(cuts) > 1 else cuts[0]


def _attend(q, k, v, *, causal, window, scale, q_offset) -> torch.Tensor:
    """One call of SDPA, with a mask of these queries and keys where it has no word for it."""
    gqa = q.shape[1] != k.shape[1]
    plain = window is None and (not causal or (q_offset == 0 and q.shape[2] == k.shape[2]))
    mask = None if plain else visible(q.shape[2], k.shape[2], causal, window, q_offset, q.device)
    if gqa and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The one kernel that takes these does not share key heads; without it the whole matrix of
        # scores would be held.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        gqa = False
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and plain, scale=scale, enable_gqa=gqa
    )


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
