"""Causal language models of transformers, from the configuration in a folder.

Sequences are whole rows here: what is packed together sees what came before, as in pretraining
without document masks, since few families pass documents on to their attention.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stretto.errors import ConfigError, UnsupportedModel
from stretto.plan.ranges import Mask
from stretto.train.recipe import Recipe
from stretto.train.tasks import UNKNOWN, next_token_loss
from stretto.train.text import END, Corpus, Stream, open_corpus

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences beside one another. tokens, labels: (B, N); positions: (N,)."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


@dataclass
class HuggingFaceTask:
    """Predict the next byte with a model of transformers, its weights drawn from the seed."""

    name: str
    config: Any
    corpus: Corpus
    stream: Stream
    held_out: Stream
    tokens: int
    seed: int

    def __post_init__(self):
        self._products = 0

    @property
    def digest(self) -> str:
        return self.corpus.digest

    def model(self) -> nn.Module:
        """The whole model, on the CPU, as the library initialises it. Dropout stays off."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        # In eval, since random masks would depend on how many ranks there are.
        model.eval()
        self._products = _products(model)
        return model

    def sample(self, number: int, count: int = 1, *, held_out: bool = False) -> Rows:
        stream = self.held_out if held_out else self.stream
        packed = stream.packed(number, self.tokens, count)
        shape = (count, self.tokens)
        positions = torch.arange(self.tokens)
        return Rows(packed.tokens.view(shape), packed.labels.view(shape), positions)

    def mask(self, sample: Rows) -> Mask:
        return Mask(causal=True)

    def length(self, sample: Rows) -> int:
        return self.tokens

    def cut(self, sample: Rows, rows: torch.Tensor | None) -> Rows:
        if rows is None:
            return sample
        return Rows(sample.tokens[:, rows], sample.labels[:, rows], sample.positions[rows])

    def count(self, part: Rows) -> int:
        return int((part.labels != UNKNOWN).sum())

    def loss(self, model: nn.Module, part: Rows) -> torch.Tensor:
        positions = part.positions.expand_as(part.tokens)
        found = model(input_ids=part.tokens, position_ids=positions, use_cache=False)
        return next_token_loss(found.logits.flatten(0, 1), part.labels.flatten())

    def flops(self, sample: Rows) -> float:
        rows, tokens = sample.tokens.shape
        text = self.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 0)
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
        pairs = tokens * (tokens + 1) // 2
        attended = 4 * text.num_hidden_layers * width * pairs
        return 3.0 * rows * (2 * self._products * tokens + attended)


def hugging_face_task(recipe: Recipe) -> HuggingFaceTask:
    """The task of a folder with a config.json. Raises ConfigError, UnsupportedModel."""
    try:
        config = AutoConfig.from_pretrained(recipe.model, local_files_only=True)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ConfigError(f"{recipe.model} holds no model configuration: {cause}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModel(
            f"{recipe.model}: {config.model_type} is no causal language model of transformers"
        )
    vocabulary = config.get_text_config().vocab_size
    if vocabulary <= END:
        raise UnsupportedModel(
            f"{recipe.model}: vocabulary of {vocabulary}; the tokens here are {END} bytes and the "
            f"end of a document, so at least {END + 1}"
        )
    if recipe.recompute:
        raise ConfigError(
            f"--recompute with {recipe.model}: transformers would run attention, and with it the "
            "ring, twice; leave it out, or take a preset"
        )
    _warn_of_dropout(config)
    corpus = open_corpus(recipe.data)
    streams = corpus.stream(recipe.seed), corpus.held_out_stream()
    return HuggingFaceTask(recipe.model, config, corpus, *streams, recipe.tokens, recipe.seed)


def _warn_of_dropout(config: Any) -> None:
    rates = {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value > 0
    }
    if rates:
        log.warning("dropout %s stays off: its random masks would depend on the ranks", rates)


def _products(model: Any) -> int:
    """Parameters that every token is multiplied with: matrices other than embeddings."""
    linear = (p for m in model.modules() if not isinstance(m, nn.Embedding) for p in _own(m))
    tied = model.get_output_embeddings()
    found = {id(p): p.numel() for p in linear if p.ndim > 1}
    if tied is not None:
        found[id(tied.weight)] = math.prod(tied.weight.shape)
    return sum(found.values())


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))
