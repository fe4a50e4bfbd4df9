"""What stands at the entrance of a bound language model: inputs that are right on a shard pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stretto.errors import UnsupportedModel
from stretto.parallel.context import Binding
from stretto.parallel.layouts.masks import refuse_padding

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
    call's documents for the layers. Raises UnsupportedModel.
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
        named["position_ids"] = self._positions(name, named)
        if "use_cache" in self.signature.parameters:
            named["use_cache"] = False
        self._note(named)
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
        return positions + self.origin if self.origin else positions

    def _note(self, named: dict[str, Any]) -> None:
        """What the layers of this call share; one small message instead of one per layer."""
        mesh = self.binding.mesh
        rows = torch.tensor([named["position_ids"].shape[-1]])
        shares = mesh.all_gather(rows, "cp", "control").wait()
        tokens = sum(int(share) for share in shares)
        self.binding.call = {"documents": named.get("documents"), "tokens": tokens}
        if "position_ids" not in self.signature.parameters:
            self.binding.call["position_ids"] = named.pop("position_ids")
