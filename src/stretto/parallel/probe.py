"""Does a model mix tokens anywhere but in attention, and does it count positions as it is told?

Attention is replaced by "each token sees only its own query, key and value". Whatever influence
between tokens is left is mixing elsewhere, which on a shard would silently miss the other ranks'
tokens. Then some tokens are run alone, at their own positions: what comes out, and every query and
key on the way, must be what came out of the whole sequence.

A handful of short forward passes in eval mode, without gradients and without communication, so
every rank comes to the same verdict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from stretto.errors import UnsupportedModel
from stretto.parallel.context import Binding
from stretto.parallel.layouts.causal_lm import parameters, position_tables

#: Enough for two stretches per shard and for short convolutions to show.
TOKENS = 12
CHANGED = 5
#: Two stretches, as a zigzag shard has.
SHARD = (2, 3, 4, 9, 10)
#: Relative difference of equal results. Routers and rotations compute in float32 in any model, and
#: another number of rows rounds otherwise; half precisions also round what passes between modules.
_ROUNDING = {
    torch.float64: 64 * torch.finfo(torch.float32).eps,
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
}
#: What a forward raises that meets a mask it did not expect.
FAILURES = (TypeError, AttributeError, ValueError, KeyError, IndexError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Findings:
    """What the model's entrance must know.

    `layers`: names of the modules that attend. `origin`: the number of the first position.
    `sums_loss`: whether its loss over shards, given `shift_labels` and `num_items_in_batch`, adds
    up.
    """

    layers: tuple[str, ...] = ()
    origin: int = 0
    sums_loss: bool = False


@dataclass
class Watch:
    """Stands in for attention: every token sees itself only; remembers what it was given."""

    binding: Binding
    calls: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    layers: dict[int, nn.Module] = field(default_factory=dict)

    def attend(self, module, query, key, value) -> torch.Tensor:
        """A softmax over one key is 1: the output is the token's own value, per query head."""
        if query.shape[2] != key.shape[2]:
            raise UnsupportedModel(
                f"{type(module).__name__}: {query.shape[2]} queries on {key.shape[2]} keys of "
                "another sequence, which no plan has split"
            )
        self.calls.append((query, key, value))
        self.layers[id(module)] = module
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


@dataclass
class Trace:
    """One forward pass: logits, attention inputs, and the outputs of all modules by name."""

    logits: torch.Tensor
    calls: list[tuple[torch.Tensor, ...]]
    outputs: dict[str, torch.Tensor]

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, (B, T, ...) tensor) of everything that has a row per token, in order."""
        yield from self.outputs.items()
        for number, call in enumerate(self.calls):
            for what, tensor in zip(("queries", "keys", "values"), call, strict=True):
                yield f"{what} of attention call {number}", tensor.transpose(1, 2)
        yield "logits", self.logits


def examine(model: nn.Module, binding: Binding) -> Findings:
    """What a bound model's forward depends on. Raises UnsupportedModel, naming the module.

    The model is bound already; it runs on its own device.
    """
    watch = Watch(binding)
    name = type(model).__name__
    known = parameters(model)
    if "position_ids" not in known and not position_tables(model):
        raise UnsupportedModel(
            f"{name}.forward takes no position_ids\n  why: a shard would count its tokens from 0"
        )
    with _examined(model, binding, watch):
        ids = _tokens(model, range(TOKENS))
        whole = _run(model, watch, ids, range(TOKENS))
        if not watch.calls:
            raise UnsupportedModel(f"{name} never calls transformers' attention interface")
        _check_mixing(model, watch, ids, whole)
        origin = _origin(model, watch, ids, whole)
        if origin:
            whole = _run(model, watch, ids, range(origin, origin + TOKENS))
        _check_positions(model, watch, ids, whole, origin)
        sums = "labels" in known and _loss_adds_up(model, watch, ids, origin)
    layers = tuple(name for name, part in model.named_modules() if id(part) in watch.layers)
    return Findings(layers, origin, sums)


def _tokens(model: nn.Module, numbers: Sequence[int]) -> torch.Tensor:
    """(1, n) token numbers, distinct where the vocabulary allows, away from the special first."""
    device = next(model.parameters()).device
    if device.type == "meta":
        raise UnsupportedModel(
            f"{type(model).__name__} has no weights yet\n  why: examining it needs values\n"
            "  to fix: materialise it first, or check=False for a model that was examined before"
        )
    size = getattr(_text_config(model), "vocab_size", 100)
    return torch.tensor([[(10 + n) % size for n in numbers]], device=device)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


@contextlib.contextmanager
def _examined(model: nn.Module, binding: Binding, watch: Watch) -> Generator[None]:
    modes = [(part, part.training) for part in model.modules()]
    binding.watch = watch
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        binding.watch = None
        binding.call = {}
        for part, training in modes:
            part.training = training


def _run(model, watch: Watch, ids, positions: Sequence[int] | None, **more: Any) -> Trace:
    if "use_cache" in parameters(model):
        more["use_cache"] = False
    if positions is not None:
        more |= _placed(model, watch, torch.tensor([list(positions)], device=ids.device))
    else:
        watch.binding.call = {}
    watch.calls = []
    with _recorded(model, ids.shape[1]) as outputs:
        try:
            result = model(input_ids=ids, **more)
        except UnsupportedModel:
            raise
        except FAILURES as error:
            reason = str(error).strip().splitlines() or [""]
            raise UnsupportedModel(
                f"{type(model).__name__} fails under the attention interface with "
                f"{type(error).__name__}: {reason[0][:200]}\n"
                "  why: it builds or reads attention masks on its own, or needs other inputs"
            ) from error
    logits = getattr(result, "logits", None)
    logits = result[0] if logits is None else logits
    if logits.shape[:2] != ids.shape:
        raise UnsupportedModel(
            f"{type(model).__name__} returns {tuple(logits.shape)} for {ids.shape[1]} tokens, "
            "not a row per token"
        )
    return Trace(logits, watch.calls, outputs)


def _placed(model, watch: Watch, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments that give the model these positions, or none where its table is told them."""
    if "position_ids" in parameters(model):
        return {"position_ids": positions}
    watch.binding.call = {"position_ids": positions}
    return {}


@contextlib.contextmanager
def _recorded(model: nn.Module, tokens: int) -> Generator[dict[str, torch.Tensor]]:
    """Outputs of modules that have a row per token, in the order in which they finished."""
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def keep(module, args, output):
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, torch.Tensor) and first.dim() > 2 and first.shape[1] == tokens:
                outputs.setdefault(f"{name} ({type(module).__name__})", first)

        return keep

    handles = [
        part.register_forward_hook(hook(name)) for name, part in model.named_modules() if name
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return True
    if not a.is_floating_point() or not a.numel():
        return not torch.equal(a, b)
    scale = torch.maximum(a.abs().max(), b.abs().max()).item()
    return not (a - b).abs().max().item() <= _ROUNDING[a.dtype] * scale


def _first_difference(here: Trace, there: Trace, rows: list[int], other: list[int]) -> str | None:
    """Name of the first part whose `rows` here are not the `other` rows there."""
    if len(here.calls) != len(there.calls):
        return f"the number of attention calls ({len(here.calls)}, then {len(there.calls)})"
    pairs = dict(there.parts())
    for name, tensor in here.parts():
        match = pairs.get(name)
        if match is None or match.dim() != tensor.dim() or match.shape[1] <= max(other):
            continue
        if _differs(tensor[:, rows], match[:, other]):
            return name
    return None


def _check_mixing(model, watch, ids, whole: Trace) -> None:
    changed = ids.clone()
    changed[:, CHANGED] = _tokens(model, [TOKENS])
    others = [place for place in range(TOKENS) if place != CHANGED]
    found = _first_difference(whole, _run(model, watch, changed, range(TOKENS)), others, others)
    if found:
        raise UnsupportedModel(
            f"{found} mixes tokens outside the attention interface\n"
            "  why: on a shard it would miss the tokens of other ranks"
        )


def _origin(model, watch, ids, whole: Trace) -> int:
    """The number of the first position where none are given."""
    free = _run(model, watch, ids, None)
    rows = list(range(TOKENS))
    if _first_difference(whole, free, rows, rows) is None:
        return 0
    pad = getattr(_text_config(model), "pad_token_id", None)
    for origin in dict.fromkeys((1, 2, (pad or 0) + 1)):
        told = _run(model, watch, ids, range(origin, origin + TOKENS))
        if _first_difference(told, free, rows, rows) is None:
            return origin
    raise UnsupportedModel(
        f"{type(model).__name__} counts positions in a way of its own: without position_ids its "
        "results are those of no consecutive numbers"
    )


def _check_positions(model, watch, ids, whole: Trace, origin: int) -> None:
    rows = list(SHARD)
    alone = _run(model, watch, ids[:, rows], [origin + place for place in rows])
    found = _first_difference(alone, whole, list(range(len(rows))), rows)
    if found:
        raise UnsupportedModel(
            f"{found} ignores position_ids or depends on how many tokens there are\n"
            "  why: a shard's tokens would stand at other positions than in the whole sequence"
        )


def _loss_adds_up(model, watch, ids, origin: int) -> bool:
    """Whether shards' losses sum to the whole one, which is the cross entropy of the logits."""
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    count = torch.tensor(TOKENS - 1, device=ids.device)
    rest = [place for place in range(TOKENS) if place not in SHARD]
    losses = []
    for rows in (list(range(TOKENS)), list(SHARD), rest):
        positions = torch.tensor([[origin + place for place in rows]], device=ids.device)
        more = {"use_cache": False} if "use_cache" in parameters(model) else {}
        own = targets[:, rows].contiguous()
        try:
            result = model(
                input_ids=ids[:, rows],
                **_placed(model, watch, positions),
                labels=own,
                shift_labels=own,
                num_items_in_batch=count,
                **more,
            )
        except FAILURES:
            return False
        logits = result.logits.double().flatten(0, 1)
        own_loss = functional.cross_entropy(logits, own.flatten(), reduction="sum") / count
        losses.append((float(result.loss), float(own_loss)))
    close = all(abs(told - right) <= 1e-4 * max(1.0, abs(right)) for told, right in losses)
    return close and abs(losses[0][0] - losses[1][0] - losses[2][0]) <= 1e-4 * losses[0][0]
