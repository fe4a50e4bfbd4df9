"""`shard`: this rank's tokens of a batch, with what a language model must know about the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from stretto.errors import ShapeError
from stretto.ops.attention.layout import row_positions
from stretto.parallel.context import own_rows
from stretto.parallel.layouts.masks import refuse_padding
from stretto.plan import ranges
from stretto.plan.context import of_sequence

if TYPE_CHECKING:
    from stretto.mesh.mesh import Mesh
    from stretto.plan.context import Context
    from stretto.plan.model import Plan

#: Labels with this value do not count; torch's cross entropy has the same default.
IGNORED = -100


def shard(
    batch: Mapping[str, Any] | torch.Tensor,
    mesh: Mesh,
    plan: Plan | Context,
    *,
    documents: Sequence[int] | None = None,
    causal: bool = True,
) -> Any:
    """This rank's tokens of a batch that is whole on every rank.

    A tensor (B, N, ...) is cut along dim 1. In a mapping, every tensor whose dim 1 has the length
    of `input_ids` (or `inputs_embeds`) is cut, others stay, and what a causal language model needs
    is added: `position_ids`, global, from 0 in every document; from `labels` also `shift_labels`,
    shifted before cutting, and `num_items_in_batch`, the labels that count on all ranks;
    `documents`, lengths of packed sequences, as given. An `attention_mask` that hides nothing is
    dropped. `causal` decides an `auto` layout.

    The loss of each rank is then its share: the sum over ranks is the mean over the batch.
    Raises ShapeError for documents that do not sum to the length and for what is no batch,
    UnsupportedModel for padding, ConfigError for what is no mesh.
    """
    lengths = ranges.packed(documents)
    mask = ranges.Mask(causal=causal, documents=lengths)
    context = of_sequence(plan)
    if isinstance(batch, torch.Tensor):
        rows = _rows(_length(batch, "the tensor"), mesh, context, mask, batch.device)
        return _cut(batch, rows)
    if not isinstance(batch, Mapping):
        raise ShapeError(
            f"the batch is a {type(batch).__name__}\n"
            "  to fix: a tensor (batch, tokens, ...), or a mapping with input_ids or inputs_embeds"
        )
    whole = dict(batch)
    tokens = _tokens(whole)
    rows = _rows(tokens, mesh, context, mask, _device(whole))
    refuse_padding(whole.pop("attention_mask", None))
    if whole.get("labels") is not None and "shift_labels" not in whole:
        whole |= _targets(_labels(whole["labels"], tokens), lengths)
    if "position_ids" not in whole:
        whole["position_ids"] = _positions(tokens, lengths, _device(whole))
    own = {
        name: _cut(value, rows) if _per_token(value, tokens) else value
        for name, value in whole.items()
    }
    return own if lengths is None else {**own, "documents": lengths}


def _tokens(batch: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if batch.get(name) is not None:
            return _length(batch[name], name)
    raise ShapeError(
        f"a batch of {', '.join(batch) or 'nothing'}: its length is that of input_ids or "
        "inputs_embeds; pass one of them, or a tensor to cut along dim 1"
    )


def _length(x: Any, name: str) -> int:
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        what = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ShapeError(f"{name} ({what}): expected a tensor (batch, tokens, ...)")
    return x.shape[1]


def _device(batch: dict[str, Any]) -> torch.device:
    return next(value for value in batch.values() if isinstance(value, torch.Tensor)).device


def _per_token(value: Any, tokens: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens


def _cut(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return value.index_select(1, rows)


def _rows(tokens: int, mesh: Mesh, plan: Context, mask: ranges.Mask, device) -> torch.Tensor:
    """Global positions of this rank's tokens, ascending: int64 (rows,)."""
    mask.check(tokens, tokens)
    return row_positions(own_rows(tokens, mesh, plan, mask), device)


def _positions(tokens: int, documents: tuple[int, ...] | None, device) -> torch.Tensor:
    lengths = (tokens,) if documents is None else documents
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def _labels(labels: Any, tokens: int) -> torch.Tensor:
    if _length(labels, "labels") != tokens:
        raise ShapeError(
            f"labels of {labels.shape[1]} tokens beside inputs of {tokens}\n"
            "  why: a label stands at its own token; shard shifts them\n"
            "  to fix: labels as long as the inputs, -100 where none counts"
        )
    return labels


def _targets(labels: torch.Tensor, documents: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """Labels shifted so that a token predicts the next of its own document."""
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    end = 0
    for length in documents or ():
        end += length
        if length:
            shifted[:, end - 1] = IGNORED
    count = (shifted != IGNORED).sum()
    return {"shift_labels": shifted, "num_items_in_batch": count}
