"""Masks of transformers as declarations: what a layer may see, read from the library's own rules.

The library composes a mask from small functions of two positions. A bound model needs those rules,
not a tensor, which a rank could only fill for its own tokens. Rules that are no range of positions
(blocks of an image, padding, a caller's own function) are refused by name.
Source: transformers 5.24, `masking_utils.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stretto.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Visible:
    """What a query sees: earlier keys only, at most `window` of them, within its chunk.

    Takes the place of a mask tensor between a model's mask function and its attention layers.
    `chunk`: positions are cut into equal stretches that do not see one another.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    def documents(self, tokens: int) -> tuple[int, ...] | None:
        """Chunks as lengths of documents that sum to `tokens`."""
        if self.chunk is None or tokens <= self.chunk:
            return None
        full, rest = divmod(tokens, self.chunk)
        return (self.chunk,) * full + ((rest,) if rest else ())


def visible(
    *, mask_function: Callable, attention_mask: Any = None, q_offset: Any = 0, **sizes: Any
) -> Visible:
    """The mask function that transformers calls: the rules behind `mask_function`.

    Raises UnsupportedModel for padding, for cached keys, and for rules that are no range.
    """
    refuse_padding(attention_mask)
    if int(q_offset) or sizes.get("kv_length") != sizes.get("q_length"):
        raise UnsupportedModel(
            f"{sizes.get('q_length')} queries on {sizes.get('kv_length')} keys from offset "
            f"{int(q_offset)}: a bound model takes whole sequences, not steps of a cache\n"
            "  to fix: use_cache=False, or undo the plan before generating"
        )
    return combined(list(_rules(mask_function)))


def refuse_padding(attention_mask: Any) -> None:
    """Raise UnsupportedModel unless the mask is absent or hides nothing."""
    if attention_mask is None or isinstance(attention_mask, Visible):
        return
    if getattr(attention_mask, "ndim", 0) != 2:
        raise UnsupportedModel(
            f"a dense attention mask of shape {tuple(getattr(attention_mask, 'shape', ()))}: no "
            "rank holds the rows and columns of others\n"
            "  to fix: say it as documents=(lengths), or by the model's own windows"
        )
    hidden = int((attention_mask == 0).sum())
    if hidden:
        raise UnsupportedModel(
            f"a padding mask that hides {hidden} of {attention_mask.numel()} tokens\n"
            "  why: ranks would hold different shares of padding, and pairs are not ranges\n"
            "  to fix: pack the sequences one after another and pass documents=(lengths)"
        )


Rule = tuple[str, int]


def combined(rules: list[Rule]) -> Visible:
    """All rules together: the narrowest window, one chunk.

    Raises UnsupportedModel for a window that looks back only but forward without end.
    """
    found: dict[str, set[int]] = {}
    for kind, size in rules:
        found.setdefault(kind, set()).add(size)
    causal = "causal" in found
    if "behind" in found and not causal:
        raise UnsupportedModel("a window into the past beside a free view of the future")
    if len(found.get("chunk", ())) > 1:
        raise UnsupportedModel(f"chunks of {sorted(found['chunk'])} at once")
    windows = found.get("behind", set()) | found.get("around", set())
    return Visible(causal, min(windows, default=None), next(iter(found.get("chunk", ())), None))


def _rules(function: Callable) -> Iterator[Rule]:
    """The parts of a composed mask function that restrict what is seen."""
    name = getattr(function, "__qualname__", repr(function)).replace(".<locals>", "")
    read = _READERS.get(name)
    if read is None:
        raise UnsupportedModel(
            f"mask rule {name}: no range of positions, so no rank can know it of other ranks' "
            "tokens\n  to fix: leave out the input that asks for it, or run without a plan"
        )
    yield from read(inspect.getclosurevars(function).nonlocals)


def _both(parts: Mapping[str, Any]) -> Iterator[Rule]:
    for function in parts["mask_functions"]:
        yield from _rules(function)


def _chunk(parts: Mapping[str, Any]) -> Iterator[Rule]:
    if int(parts["left_padding"].sum()):
        raise UnsupportedModel("chunks behind left padding: pack the sequences instead")
    yield "chunk", int(parts["chunk_size"])


_READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Rule]]] = {
    "causal_mask_function": lambda parts: iter([("causal", 0)]),
    "bidirectional_mask_function": lambda parts: iter(()),
    "and_masks.and_mask": _both,
    "sliding_window_overlay.inner_mask": lambda parts: iter(
        [("behind", int(parts["sliding_window"]))]
    ),
    # Its distance is inclusive, a window counts the token itself.
    "sliding_window_bidirectional_overlay.inner_mask": lambda parts: iter(
        [("around", int(parts["sliding_window"]) + 1)]
    ),
    "chunked_overlay.inner_mask": _chunk,
    # Positions of a shard are not consecutive, which looks like packed sequences. Where documents
    # really begin is said by `documents`, and the hook at the entrance checks it.
    "packed_sequence_mask_function.inner_mask": lambda parts: iter(()),
    "remap_positions_for_packed_sequence.inner_mask": lambda parts: _rules(parts["mask_function"]),
}
