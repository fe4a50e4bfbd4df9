"""What a model is trained to do: its samples, its loss over some rows, its arithmetic.

A task makes whole samples, the same on every rank; which rows of them a rank works on is decided
outside, from `mask`, and comes back as an index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from stretto.errors import ConfigError
from stretto.plan.ranges import Mask
from stretto.train.dit import Dit, DitShape
from stretto.train.gpt import Gpt, GptShape
from stretto.train.pictures import Noised, Patterns
from stretto.train.recipe import Recipe
from stretto.train.text import Corpus, Packed, Stream, open_corpus

#: Label of a token whose successor is unknown; such tokens do not count.
UNKNOWN = -100


class Task(Protocol):
    """A model with its data. Samples are numbered; `held_out` ones are never trained on."""

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        ...

    @property
    def digest(self) -> str:
        """Names the data: another digest is other data."""
        ...

    @property
    def remarks(self) -> tuple[str, ...]:
        """What somebody who trains this should know."""
        ...

    @property
    def binds_alone(self) -> bool:
        """Whether attention is bound on one rank too, which then needs more than torch's own."""
        ...

    def model(self) -> nn.Module:
        """The model without weights, on the meta device; `initial` gives each parameter its own."""
        ...

    def sample(self, number: int, count: int = 1, *, held_out: bool = False) -> Any:
        """Samples `number` to `number + count` as one whole; a function of seed and number."""
        ...

    def mask(self, sample: Any) -> Mask: ...

    def length(self, sample: Any) -> int:
        """Rows along which a sample is cut."""
        ...

    def cut(self, sample: Any, rows: torch.Tensor | None) -> Any:
        """The part of a sample that a rank with these rows works on, all of it for None."""
        ...

    def count(self, part: Any) -> int:
        """Terms of the loss in a part."""
        ...

    def loss(self, model: nn.Module, part: Any) -> torch.Tensor:
        """The sum of these terms, float32 or better."""
        ...

    def flops(self, sample: Any) -> float:
        """Floating-point operations of forward and backward, without recomputation."""
        ...


@dataclass
class TextTask:
    """Predict the next byte of packed documents with a preset GPT.

    `joined`: a token sees the documents before its own too, as far as its sequence reaches.
    """

    name: str
    shape: GptShape
    corpus: Corpus
    stream: Stream
    held_out: Stream
    tokens: int
    recompute: bool = False
    joined: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return self.corpus.digest

    @property
    def binds_alone(self) -> bool:
        # Torch's own attention needs masks for a window, and computes what they hide.
        return self.shape.window is not None

    def model(self) -> nn.Module:
        with torch.device("meta"):
            return Gpt(self.shape, recompute=self.recompute)

    def sample(self, number, count=1, *, held_out=False) -> Packed:
        stream = self.held_out if held_out else self.stream
        packed = stream.packed(number, self.tokens, count)
        return rows_of(packed, self.tokens, count) if self.joined else packed

    def mask(self, sample: Packed) -> Mask:
        return Mask(causal=True, window=self.shape.window, documents=sample.documents)

    def length(self, sample: Packed) -> int:
        return len(sample.tokens)

    def cut(self, sample: Packed, rows) -> Packed:
        if rows is None:
            return sample
        parts = (sample.tokens[rows], sample.labels[rows], sample.positions[rows])
        return Packed(*parts, sample.documents)

    def count(self, part: Packed) -> int:
        return int((part.labels != UNKNOWN).sum())

    def loss(self, model, part: Packed) -> torch.Tensor:
        logits = model(part.tokens[None], part.positions, part.documents)
        return next_token_loss(logits[0], part.labels)

    def flops(self, sample: Packed) -> float:
        pairs = sum(causal_pairs(n, self.shape.window) for n in sample.documents)
        per_pair = 4 * self.shape.layers * self.shape.heads * self.shape.head_dim
        return 3.0 * (2 * self.shape.multiplied * self.length(sample) + per_pair * pairs)


@dataclass
class PictureTask:
    """Predict the velocity of noised, captioned latents with a preset DiT."""

    name: str
    shape: DitShape
    patterns: Patterns
    grid: int
    recompute: bool = False
    digest: str = "patterns/1"
    remarks: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def binds_alone(self) -> bool:
        return False

    def model(self) -> nn.Module:
        with torch.device("meta"):
            return Dit(self.shape, recompute=self.recompute)

    def sample(self, number, count=1, *, held_out=False) -> Noised:
        patterns = Patterns(self.patterns.seed, 1) if held_out else self.patterns
        return patterns.noised(number, self.grid, count)

    def mask(self, sample: Noised) -> Mask:
        return Mask()

    def length(self, sample: Noised) -> int:
        return sample.patches.shape[1]

    def cut(self, sample: Noised, rows) -> Noised:
        if rows is None:
            return sample
        return Noised(
            sample.patches[:, rows],
            sample.velocity[:, rows],
            sample.places[rows],
            sample.noise,
            sample.text,
        )

    def count(self, part: Noised) -> int:
        return part.velocity.numel()

    def loss(self, model, part: Noised) -> torch.Tensor:
        found = model(part.patches, part.places, part.noise, part.text)
        kept = torch.promote_types(found.dtype, torch.float32)
        return functional.mse_loss(found.to(kept), part.velocity.to(kept), reduction="sum")

    def flops(self, sample: Noised) -> float:
        items, tokens = sample.patches.shape[:2]
        attended = tokens * (tokens + sample.text.shape[1])
        per_pair = 4 * self.shape.layers * self.shape.width
        return 3.0 * items * (2 * self.shape.multiplied * tokens + per_pair * attended)


def next_token_loss(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over known labels, in float32 (float64 for float64)."""
    kept = torch.promote_types(logits_TV.dtype, torch.float32)
    return functional.cross_entropy(
        logits_TV.to(kept), labels_T, reduction="sum", ignore_index=UNKNOWN
    )


def causal_pairs(tokens: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in one document."""
    seen = tokens if window is None else min(tokens, window)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def rows_of(packed: Packed, tokens: int, count: int) -> Packed:
    """The same tokens with every sequence taken for one document."""
    positions = torch.arange(tokens).repeat(count)
    return replace(packed, positions=positions, documents=(tokens,) * count)


def text_task(recipe: Recipe, shape: GptShape) -> TextTask:
    """A GPT on the text of a folder. Raises ConfigError."""
    corpus = open_corpus(recipe.data, tokens=recipe.tokens)
    return TextTask(
        recipe.model,
        replace(shape, window=recipe.window),
        corpus,
        corpus.stream(recipe.seed),
        corpus.held_out_stream(),
        recipe.tokens,
        recipe.recompute,
        recipe.documents == "joined",
    )


def picture_task(recipe: Recipe, shape: DitShape) -> PictureTask:
    """A DiT on patterns. Raises ConfigError: no square of tokens, options of text."""
    given = {n: getattr(recipe, n) for n in ("data", "window", "documents")}
    asked = [f"--{name} {value}" for name, value in given.items() if value is not None]
    if asked:
        raise ConfigError(
            f"{recipe.model} learns drawn patterns and reads no text, {', '.join(asked)} is of text"
            f"\n  to fix: leave it out, or take a gpt preset"
        )
    grid = math.isqrt(recipe.tokens)
    if grid**2 != recipe.tokens:
        raise ConfigError(
            f"{recipe.tokens} tokens are no square of patches; give {grid**2} or {(grid + 1) ** 2}"
        )
    return PictureTask(recipe.model, shape, Patterns(recipe.seed), grid, recipe.recompute)


def to_device(part: Any, device: torch.device) -> Any:
    """A copy of a part with its tensors on a device."""
    values = (getattr(part, field.name) for field in fields(part))
    return type(part)(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in values))
