"""Causal language models of transformers, from the configuration in a folder.

Sequences are whole rows here: what is packed together sees what came before, as in pretraining
without document masks, since few families pass documents on to their attention. A recipe with
`documents="apart"` asks for those that do.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stretto.errors import ConfigError, UnsupportedModel
from stretto.plan.ranges import Mask
from stretto.train.recipe import Recipe
from stretto.train.tasks import UNKNOWN, causal_pairs, next_token_loss
from stretto.train.text import END, Corpus, Stream, open_corpus

#: Tokens that a model is examined with.
_EXAMINED = 8
#: Files of weights, which a folder with a configuration may hold as well.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences beside one another. tokens, labels: (B, N); positions: (N,).

    `documents`: lengths that sum to N where a token sees its own document only, else None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: tuple[int, ...] | None = None


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
    apart: bool = False
    remarks: tuple[str, ...] = ()

    def __post_init__(self):
        self._products = 0

    @property
    def digest(self) -> str:
        return self.corpus.digest

    @property
    def binds_alone(self) -> bool:
        # What transformers does with packed documents by itself differs from family to family.
        return self.apart

    def model(self) -> nn.Module:
        """The whole model, on the CPU, as the library initialises it. Dropout stays off."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        # In eval, since random masks would depend on how many ranks there are.
        model.eval()
        check_causal(model, self.name, self.tokens)
        self._products = _products(model)
        return model

    def sample(self, number: int, count: int = 1, *, held_out: bool = False) -> Rows:
        stream = self.held_out if held_out else self.stream
        packed = stream.packed(number, self.tokens, count)
        if self.apart:
            own = (packed.tokens[None], packed.labels[None], packed.positions)
            return Rows(*own, packed.documents)
        shape = (count, self.tokens)
        positions = torch.arange(self.tokens)
        return Rows(packed.tokens.view(shape), packed.labels.view(shape), positions)

    def mask(self, sample: Rows) -> Mask:
        return Mask(causal=True, documents=sample.documents)

    def length(self, sample: Rows) -> int:
        return sample.tokens.shape[1]

    def cut(self, sample: Rows, rows: torch.Tensor | None) -> Rows:
        if rows is None:
            return sample
        own = (sample.tokens[:, rows], sample.labels[:, rows], sample.positions[rows])
        return Rows(*own, sample.documents)

    def count(self, part: Rows) -> int:
        return int((part.labels != UNKNOWN).sum())

    def loss(self, model: nn.Module, part: Rows) -> torch.Tensor:
        positions = part.positions.expand_as(part.tokens)
        more = {} if part.documents is None else {"documents": part.documents}
        found = model(input_ids=part.tokens, position_ids=positions, use_cache=False, **more)
        return next_token_loss(found.logits.flatten(0, 1), part.labels.flatten())

    def flops(self, sample: Rows) -> float:
        rows, tokens = sample.tokens.shape
        text = self.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 0)
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
        pairs = sum(map(causal_pairs, sample.documents or (tokens,)))
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
    if recipe.window is not None:
        raise ConfigError(
            f"--window {recipe.window} with {recipe.model}: layers of transformers take their own "
            "from the configuration\n"
            "  to fix: sliding_window in its config.json where the family knows it, or a gpt preset"
        )
    remarks = (*_about_dropout(config), *_about_weights(Path(recipe.model)))
    corpus = open_corpus(recipe.data, tokens=recipe.tokens)
    return HuggingFaceTask(
        recipe.model,
        config,
        corpus,
        corpus.stream(recipe.seed),
        corpus.held_out_stream(),
        recipe.tokens,
        recipe.seed,
        recipe.documents == "apart",
        remarks,
    )


def check_causal(model: nn.Module, name: str, tokens: int) -> None:
    """Raise UnsupportedModel for a model that cannot learn to predict the next of `tokens` tokens.

    Runs it twice on a few tokens at the end of a sequence: one whose position table is too short
    has no row for them, and one that looks ahead answers otherwise when the last token is another.
    """
    few = min(tokens, _EXAMINED)
    ids = torch.arange(few)[None] + 10
    options = {"position_ids": torch.arange(tokens - few, tokens)[None], "use_cache": False}
    known = inspect.signature(model.forward).parameters
    options = {key: value for key, value in options.items() if key in known or "kwargs" in known}
    with torch.no_grad():
        try:
            found = model(input_ids=ids, **options).logits
        except IndexError:
            raise UnsupportedModel(
                f"{name}: {type(model).__name__} has no position {tokens - 1}: "
                f"{_positions(model)}, --tokens is {tokens}\n"
                "  why: it looks positions up in a table, which has a row for each\n"
                "  to fix: fewer --tokens, or a larger table in its config.json"
            ) from None
        ids[0, -1] += 1
        other = model(input_ids=ids, **options).logits
    if not torch.allclose(found[:, :-1], other[:, :-1], rtol=1e-3, atol=1e-5):
        raise UnsupportedModel(
            f"{name}: tokens of {type(model).__name__} see those behind them\n"
            "  why: a model that is shown the next token learns to copy it\n"
            "  to fix: a causal family; of some, such as BERT's, is_decoder: true in config.json"
        )


def _positions(model: Any) -> str:
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return "its table is shorter" if size is None else f"max_position_embeddings is {size}"


def _about_weights(folder: Path) -> list[str]:
    found = [file for kind in _WEIGHTS for file in sorted(folder.glob(kind))]
    return [f"{found[0]} is not read: weights are drawn from the seed"] if found else []


def _about_dropout(config: Any) -> list[str]:
    rates = {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value > 0
    }
    if not rates:
        return []
    return [f"dropout {rates} stays off: its random masks would depend on the ranks"]


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
