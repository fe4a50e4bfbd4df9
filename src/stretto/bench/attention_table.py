"""Bytes of every named plan in closed form: P = 4 to 64; 1, 4 and 8 query heads per key head."""

from __future__ import annotations

from typing import Any

from stretto.cost.attention_bytes import Call, terms, total
from stretto.plan.context import named_points
from stretto.plan.options import Context

RANKS = (4, 8, 16, 32, 64)
#: Query and key/value heads; 128 dims of bfloat16, 1024 rows per rank.
HEADS = ((32, 32), (32, 8), (32, 4))
_ROWS, _HEAD_DIM, _ITEM = 1024, 128, 2


def byte_rows() -> list[dict[str, Any]]:
    """A row per plan: bytes and blocks sent per rank, forward and backward, against the ring.

    A block is a rank's queries. `loses`: sends more forward than the ring. The ring lets gradients
    ride, as published; its own backward is `2g(P-1) + 2gP` blocks.
    """
    return [row for ranks in RANKS for heads in HEADS for row in _rows(ranks, *heads)]


def _rows(ranks: int, heads: int, kv_heads: int) -> list[dict[str, Any]]:
    call = Call(1, _ROWS, _ROWS, heads, kv_heads, _HEAD_DIM, _ITEM)
    sent = {
        name: tuple(_bytes(context, call, back=back) for back in (False, True))
        for name, context in named_points(ranks, heads, kv_heads).items()
    }
    ring = sent["ring"]
    best = min(sent, key=lambda name: sum(sent[name]))
    return [
        {
            "part": "bytes",
            "ranks": ranks,
            "heads": f"{heads}/{kv_heads}",
            "plan": name,
            "forward_bytes": forward,
            "backward_bytes": backward,
            "forward_blocks": forward / call.q_block,
            "backward_blocks": backward / call.q_block,
            "ring_over_forward": ring[0] / forward,
            "ring_over_both": sum(ring) / (forward + backward),
            "best": name == best,
            "loses": forward > ring[0],
        }
        for name, (forward, backward) in sent.items()
    ]


def _bytes(context: Context, call: Call, *, back: bool) -> int:
    return total(terms(context, call, back=back), context)
