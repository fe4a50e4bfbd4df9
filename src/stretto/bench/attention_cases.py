"""What `bench attention` runs: plans by name, attention calls by name, and the naive reference.

Data only. A plan that becomes possible appears by itself: the named points come from the Plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stretto.ops.attention import naive
from stretto.plan.context import legal_ulysses, named_points
from stretto.plan.options import AttentionCase, Context, Ring, StarTrail, Tile
from stretto.plan.ranges import Mask, Spans

#: Rows of a rank where all have the same: two in each of the two chunks of a zigzag.
ROWS = 4


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call over `ranks` ranks, in float64. `heads`: (query, key/value)."""

    name: str
    ranks: int
    tokens: int
    kv_tokens: int
    heads: tuple[int, int]
    mask: Mask
    batch: int = 1
    head_dim: int = 8

    @property
    def plain(self) -> bool:
        """Whether the closed forms hold: equal shards that no rank hides from all others."""
        plain = self.mask.window is None and self.mask.documents is None and not self.mask.prefix
        return plain and self.tokens == self.kv_tokens and self.tokens % (2 * self.ranks) == 0

    def of(self, context: Context) -> AttentionCase:
        """The call as a plan lays it out, seen from rank 0."""
        return AttentionCase.of(
            context,
            tokens=self.tokens,
            kv_tokens=self.kv_tokens,
            heads=self.heads,
            head_dim=self.head_dim,
            batch=self.batch,
            item_bytes=8,
            mask=self.mask,
            return_lse=True,
        )


def calls(ranks: int) -> list[Call]:
    """The calls for `ranks` ranks: every mask, few key heads, uneven and crossed lengths.

    In "unseen keys" queries stand in the middle of the keys, the first and last of which nobody
    sees; in "unseen band" they reach over both ends of the few keys there are.
    """
    heads, tokens = heads_for(ranks), ROWS * ranks
    few = (heads, heads // 4 if heads % 4 == 0 else 1)
    uneven, short = 5 * ranks + 3, max(1, ranks // 2)
    causal, every = Mask(causal=True), (heads, heads)
    packed = documents(tokens)
    return [
        Call("causal", ranks, tokens, tokens, every, causal),
        Call("causal 4:1", ranks, tokens, tokens, few, causal, batch=2),
        Call("window", ranks, tokens, tokens, few, Mask(causal=True, window=2 * ROWS + 1)),
        Call("documents", ranks, tokens, tokens, every, Mask(causal=True, documents=packed)),
        Call("uneven", ranks, uneven, uneven, few, causal),
        Call("full", ranks, tokens, tokens, few, Mask()),
        Call("cross", ranks, tokens, uneven, few, Mask(causal=True, q_offset=uneven - tokens)),
        Call("uneven window", ranks, uneven, uneven, every, Mask(window=6)),
        Call("ranks without rows", ranks, short, short, every, causal),
        Call(
            "unseen keys", ranks, ranks, uneven, few, Mask(causal=True, window=3, q_offset=tokens)
        ),
        Call("unseen band", ranks, uneven, ranks, every, Mask(window=2, q_offset=-ranks)),
    ]


def heads_for(ranks: int) -> int:
    """Query heads that every divisor of `ranks` splits, four at least."""
    return ranks * -(-4 // ranks)


def documents(tokens: int) -> tuple[int, ...]:
    """Lengths of packed documents: one half of all tokens, one of one token, an empty one, more."""
    lengths, left = [tokens // 2, 1, 0], tokens - tokens // 2 - 1
    while left:
        lengths.append(min(left, 3 + len(lengths)))
        left -= lengths[-1]
    return tuple(lengths)


def plans(ranks: int) -> dict[str, Context]:
    """Every named point, and ours of two levels and with other options, by name."""
    heads = heads_for(ranks)
    found = {"one rank": Context()} if ranks == 1 else named_points(ranks, heads, heads)
    return found | _options(ranks) | _two_levels(ranks)


def _options(ranks: int) -> dict[str, Context]:
    """Options that no named point has: who moves, what is kept, how gradients return."""
    if ranks == 1:
        return {}
    found = {
        "ring, owner": Context(ring=ranks, schedule=Ring()),
        "ring, queries move": Context(ring=ranks, schedule=Ring(circulate="q", prune=False)),
        "ring, keep all": Context(ring=ranks, schedule=Tile(keep="all")),
    }
    team = max((c for c in (2, 3, 4) if ranks % (c * c) == 0), default=0)
    if team:
        for schedule in (StarTrail(circulate="kv"), StarTrail(keep="far")):
            name = f"startrail({team}), {schedule.short().removeprefix('startrail ')}"
            found[name] = Context(team=team, ring=ranks // team, schedule=schedule)
    return found


def _two_levels(ranks: int) -> dict[str, Context]:
    """Tiles on nodes of the size nearest to a square, and one with Ulysses inside the node."""
    inside = max((d for d in range(2, math.isqrt(ranks) + 1) if ranks % d == 0), default=0)
    if not inside or ranks // inside < 2:
        return {}
    nodes, found = ranks // inside, {}
    for keep in ("none", "far"):
        schedule = Tile(ring_inner=inside, keep=keep)
        found[f"rings {nodes} x {inside}, keep {keep}"] = Context(ring=ranks, schedule=schedule)
    schedule = Tile(team_inner=inside, grad_wire="float32")
    found[f"rows {nodes} x {inside}"] = Context(team=ranks, schedule=schedule)
    if nodes % 2 == 0 and inside in legal_ulysses(heads_for(ranks), heads_for(ranks), ranks):
        found[f"ulysses({inside}) on {nodes} nodes, tile(2)"] = Context(
            ulysses=inside, team=2, ring=nodes // 2
        )
    if nodes % 2 == 0 and inside % 2 == 0:
        schedule = Tile(team_inner=2, ring_inner=inside // 2, keep="far")
        found["tile of two levels"] = Context(team=4, ring=ranks // 4, schedule=schedule)
    return found


# ---- tensors and the reference -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs of a call and what one device makes of them, whole; q (B, H, L, D), lse (B, H, L)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=16)
def reference(call: Call) -> Reference:
    """Float64 inputs from a fixed seed, and the naive attention of them, forward and backward."""
    generator = torch.Generator().manual_seed(call.tokens + call.kv_tokens)

    def draw(heads: int, rows: int) -> Tensor:
        shape = (call.batch, heads, rows, call.head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, dout = (draw(call.heads[0], call.tokens) for _ in range(2))
    k, v = (draw(call.heads[1], call.kv_tokens) for _ in range(2))
    seen = visible(call)
    out, lse = naive.attention(q, k, v, seen)
    grads = naive.attention_backward(dout, q, k, v, seen)
    return Reference(q, k, v, dout, out, lse, grads)


def visible(call: Call) -> Tensor:
    """(queries, keys): the mask pair by pair, written without the intervals of a plan."""
    mask = call.mask
    here = torch.arange(call.tokens)[:, None] + (mask.q_offset or 0)
    key = torch.arange(call.kv_tokens)[None]
    seen = torch.ones(call.tokens, call.kv_tokens, dtype=torch.bool)
    if mask.causal:
        seen &= key <= here
    if mask.window is not None:
        seen &= (here - key < mask.window) & (key - here < mask.window)
    if mask.documents is not None:
        ends = torch.tensor(mask.documents).cumsum(0)
        seen &= torch.bucketize(here, ends, right=True) == torch.bucketize(key, ends, right=True)
    return seen


def rows_of(spans: Spans) -> Tensor:
    """Global positions of a rank's rows, int64."""
    parts = [torch.arange(start, end) for start, end in spans]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def errors(found: Iterable[dict[str, Any]], case: AttentionCase, known: Reference) -> dict:
    """Largest error of each result over all ranks, over the largest value where that is above 1.

    `found`: by rank `out`, `lse`, `dq`, `dk`, `dv`. Rows without keys must agree exactly.
    """
    whole = {"out": known.out, "lse": known.lse} | dict(
        zip(("dq", "dk", "dv"), known.grads, strict=True)
    )
    worst = dict.fromkeys(whole, 0.0)
    for rank, own in enumerate(found):
        for name, value in whole.items():
            spans = (case.kv_rows if name in ("dk", "dv") else case.q_rows)[rank]
            worst[name] = max(worst[name], _error(own[name], value[:, :, rows_of(spans)], value))
    return worst


def _error(mine: Tensor, right: Tensor, value: Tensor) -> float:
    if mine.shape != right.shape:
        return float("inf")
    empty = right.isneginf()
    if not torch.equal(mine.isneginf(), empty) or not mine[~empty].isfinite().all():
        return float("inf")
    scale = max(1.0, value[~value.isneginf()].abs().max().item() if value.numel() else 1.0)
    apart = (mine - right)[~empty].abs()
    return apart.max().item() / scale if apart.numel() else 0.0
