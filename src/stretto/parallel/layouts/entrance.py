"""What stands at the entrance of a bound language model: inputs that are right on a shard pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stretto.errors import ShapeError, UnsupportedModel
from stretto.parallel.context import Binding, own_rows
from stretto.parallel.layouts.masks import refuse_padding
from stretto.plan.context import settled
from stretto.plan.ranges import Layout, Mask, Span, Spans, packed

_ROUTER = "router losses are products of averages over tokens, which shards cannot add up"
#: Options that change what a forward computes, and why a shard cannot give it.
_REFUSED = {
    "output_router_logits": _ROUTER,
    "output_attentions": "no rank has a row of attention weights",
    "past_key_values": "a bound model takes whole sequences, not steps of a cache",
    "cache": "a bound model takes whole sequences, not steps of a cache",
    "use_cache": "a bound model takes whole sequences, not steps of a cache",
}


@dataclass
class Entrance:
    """A forward pre-hook. Checks the call, numbers positions as the family does, and notes the
    call's documents for the layers. Raises UnsupportedModel, ShapeError.
    """

    binding: Binding
    signature: inspect.Signature
    origin: int
    sums_loss: bool

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.binding.watch is not None:
            return args, kwargs
        named = self._named(args, kwargs)
        name = type(model).__name__
        for option, reason in _REFUSED.items():
            if named.get(option):
                raise UnsupportedModel(f"{name}: {option} with a plan\n  why: {reason}")
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            raise UnsupportedModel(f"{name}: config.output_router_logits\n  why: {_ROUTER}")
        refuse_padding(named.pop("attention_mask", None))
        self._check_labels(name, named)
        if named.get("documents") is not None:
            named["documents"] = packed(named["documents"])
        if "use_cache" in self.signature.parameters:
            named["use_cache"] = False
        self._note(name, named)
        return (), named

    def _named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments by name."""
        names = [name for name in self.signature.parameters if name != "kwargs"]
        return dict(zip(names, args, strict=False)) | kwargs

    def _check_labels(self, name: str, named: dict[str, Any]) -> None:
        if named.get("labels") is None:
            return
        if not self.sums_loss:
            raise UnsupportedModel(
                f"{name}: its loss ignores shift_labels or num_items_in_batch\n"
                "  why: it would shift labels inside this rank's tokens\n"
                "  to fix: leave out labels, and divide the summed cross entropy of logits and "
                "shift_labels by num_items_in_batch"
            )
        if named.get("shift_labels") is None or named.get("num_items_in_batch") is None:
            raise UnsupportedModel(
                f"{name}: labels without shift_labels and num_items_in_batch\n"
                "  why: the next token may lie on another rank, and a mean over this rank's "
                "tokens is no mean\n  to fix: stretto.shard(batch, mesh, plan) gives all three"
            )

    def _note(self, name: str, named: dict[str, Any]) -> None:
        """What the layers of this call share, and positions as the family counts them."""
        positions, documents = self._positions(name, named), named.get("documents")
        tokens = self._tokens(name, positions)
        self._check_places(name, positions, tokens, documents)
        self.binding.call = {"documents": documents, "tokens": tokens}
        positions = positions + self.origin if self.origin else positions
        if "position_ids" in self.signature.parameters:
            named["position_ids"] = positions
        else:
            del named["position_ids"]
            self.binding.call["position_ids"] = positions

    def _positions(self, name: str, named: dict[str, Any]) -> torch.Tensor:
        positions = named.get("position_ids")
        if positions is None:
            raise UnsupportedModel(
                f"{name}: position_ids are required with a plan\n"
                "  why: without them a shard counts its tokens from 0\n"
                "  to fix: stretto.shard(batch, mesh, plan) gives them"
            )
        restarts = bool((positions[..., 1:] <= positions[..., :-1]).any())
        if restarts and named.get("documents") is None:
            raise UnsupportedModel(
                f"{name}: position_ids start again but documents are not given\n"
                "  why: a rank cannot see where documents of other ranks begin\n"
                "  to fix: pass documents=(lengths) to the model and to stretto.shard"
            )
        return positions

    def _tokens(self, name: str, positions: torch.Tensor) -> int:
        """Tokens of all ranks: one small message a call instead of one per layer."""
        rows = torch.tensor([positions.shape[-1]])
        shares = [int(n) for n in self.binding.mesh.all_gather(rows, "cp", "control").wait()]
        if 0 in shares:
            raise ShapeError(
                f"{name}: {sum(shares)} tokens over {len(shares)} ranks, cp rank "
                f"{shares.index(0)} has none\n  why: models of transformers do not take an empty "
                "sequence\n  to fix: longer sequences, or fewer ranks"
            )
        return sum(shares)

    def _check_places(
        self, name: str, positions: torch.Tensor, tokens: int, documents: tuple[int, ...] | None
    ) -> None:
        """Raise ShapeError for tokens that are not where the plan's layout puts them.

        Positions only grow along a sequence, so none is smaller than its place. Every place is on
        some rank, so positions 0, 1, ... cut in another way are smaller somewhere. Documents count
        from 0. Positions of several dims (of pictures) say nothing of places.
        """
        if positions.dim() != 2:
            return
        binding = self.binding
        mask = Mask(causal=binding.causal, documents=documents)
        with binding.mesh.ending_peers(f"{name}: position_ids"):
            mask.check(tokens, tokens)
            own = own_rows(tokens, binding.mesh, binding.plan, mask)
            places = _places(own, mask.document_spans(tokens)).to(positions.device)
            if len(places) == positions.shape[1]:
                wrong = positions < places if documents is None else positions != places
                if not bool(wrong.any()):
                    return
            layout = settled(binding.plan, causal=binding.causal, documents=documents).layout
            raise ShapeError(
                f"{name}: position_ids {_brief(positions[0])} on cp rank "
                f"{binding.mesh.rank('cp')}, where {_named(layout)} of {tokens} tokens over "
                f"{binding.plan.degree} ranks has {_brief(places)}\n"
                "  why: every rank gives its own tokens of one sequence, in the plan's layout\n"
                "  to fix: stretto.shard(batch, mesh, plan) of the plan that the model is bound "
                "to, with the same documents"
            )


def _places(rows: Spans, documents: tuple[Span, ...]) -> torch.Tensor:
    """Where rows stand in their documents: int64 (rows,)."""
    parts = [
        torch.arange(low - start, high - start)
        for start, end in documents
        for low, high in rows.within(start, end)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _brief(numbers: torch.Tensor) -> str:
    shown = [str(int(n)) for n in numbers]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])


def _named(layout: Layout) -> str:
    return f"layout {layout}" if isinstance(layout, str) else "the layout of its documents"
