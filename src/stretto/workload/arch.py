"""A transformer as arithmetic: layers, heads, widths; from a preset or a Hugging Face config.json.

Only what a plan's bytes, memory and time depend on. Reads JSON, imports no model library.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.errors import ConfigError

_MISSING = object()
#: Keys that count the experts of a layer: Mixtral's and GPT-OSS's, Qwen's and OLMoE's, DeepSeek's,
#: DBRX's and ERNIE's.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A stack of equal transformer layers.

    `mlp_matrices`: width x feed_forward matrices per layer, 3 where the MLP is gated. `vocab` 0:
    no token table. `window`: keys that a query sees, None for all. Raises ConfigError for what is
    no count, and for query heads that are no multiple of the key heads.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    mlp_matrices: int = 2
    tied: bool = True
    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        least = dict.fromkeys(("layers", "width", "heads", "kv_heads", "head_dim"), 1)
        least |= {"feed_forward": 0, "vocab": 0, "mlp_matrices": 0}
        least |= {} if self.window is None else {"window": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{self.name}: {name}={value!r}: a whole number, at least {low}")
        if self.heads % self.kv_heads:
            heads = f"{self.heads} query heads are no multiple of {self.kv_heads} key heads"
            raise ConfigError(f"{self.name}: {heads}")

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer; norms and biases are less than a thousandth."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.mlp_matrices * self.width * self.feed_forward

    @property
    def head_parameters(self) -> int:
        """Weights of the matrix onto the vocabulary."""
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        tables = self.head_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + tables


def _gpt(name: str, layers: int, heads: int, head_dim: int, **more: Any) -> Arch:
    width = heads * head_dim
    fields: dict[str, Any] = {"feed_forward": 4 * width, "vocab": 50304, "kv_heads": heads}
    fields |= {"width": width, **more}
    return Arch(name=name, layers=layers, heads=heads, head_dim=head_dim, **fields)


def _trained(name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> Arch:
    """A preset of the trainer: SwiGLU, a token per byte, its own output matrix."""
    more = {"kv_heads": kv_heads, "feed_forward": ffn, "vocab": 264}
    return _gpt(name, layers, heads, width // heads, mlp_matrices=3, tied=False, **more)


#: The trainer's presets, and shapes of published models. Layers, heads, head dim: GPT-3 (arXiv
#: 2005.14165, table 2.1), OPT-30B (arXiv 2205.01068, table 1), Llama 3 (arXiv 2407.21783, table
#: 3), DiT-XL (arXiv 2212.09748, table 1).
PRESETS = {
    arch.name: arch
    for arch in (
        _trained("gpt-tiny", 4, 128, 4, 4, 352),
        _trained("gpt-small", 8, 512, 8, 4, 1408),
        _trained("gpt-medium", 24, 1024, 16, 8, 2752),
        _trained("gpt-large", 22, 2048, 32, 4, 5632),
        _trained("gpt-8b", 32, 4096, 32, 8, 14336),
        _gpt("gpt3-1.3b", 24, 16, 128),
        _gpt("gpt3-2.7b", 32, 32, 80),
        _gpt("gpt3-6.7b", 32, 32, 128),
        _gpt("gpt3-13b", 40, 40, 128),
        _gpt("opt-30b", 48, 56, 128, vocab=50272),
        _gpt(
            "llama3-8b",
            32,
            32,
            128,
            kv_heads=8,
            feed_forward=14336,
            vocab=128256,
            mlp_matrices=3,
            tied=False,
        ),
        _gpt("dit-xl", 28, 16, 72, vocab=0, causal=False),
    )
}


def read_arch(model: str | os.PathLike[str]) -> Arch:
    """The model of a preset's name, of a config.json, or of the folder that holds one.

    Raises ConfigError: no such preset or file, no JSON, keys that are missing or do not fit.
    """
    if str(model) in PRESETS:
        return PRESETS[str(model)]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no model file and no preset {str(model)!r}\n"
            f"  to fix: a config.json or its folder, or a preset: {', '.join(PRESETS)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds {type(fields).__name__}, a model's config is an object")
    return from_config(fields, source=str(path))


def from_config(fields: dict[str, Any], *, source: str = "config") -> Arch:
    """An Arch from the keys of a Hugging Face causal-LM config.

    Raises ConfigError for keys that are missing, are no counts, or contradict one another, and
    for layers of experts.
    """
    # Vision-language models nest the decoder.
    fields = fields.get("text_config") or fields
    _check_dense(fields, source)
    heads = _count(fields, source, "num_attention_heads", "n_head", "num_heads")
    width = _count(fields, source, "hidden_size", "n_embd", "d_model")
    kv_heads = _count(fields, source, "num_key_value_heads", "num_kv_heads", default=heads)
    head_dim = _count(fields, source, "head_dim", default=width // heads)
    ffn = _count(fields, source, "intermediate_size", "n_inner", "ffn_dim", default=4 * width)
    if heads % kv_heads:
        raise ConfigError(f"{source}: {heads} query heads are no multiple of {kv_heads} key heads")
    return Arch(
        name=str(fields.get("model_type", "model")),
        layers=_count(fields, source, "num_hidden_layers", "n_layer", "num_layers"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=ffn,
        vocab=_count(fields, source, "vocab_size"),
        mlp_matrices=3 if _gated(fields) else 2,
        tied=bool(fields.get("tie_word_embeddings", True)),
        window=_window(fields, source),
    )


def _check_dense(fields: dict[str, Any], source: str) -> None:
    """Raise ConfigError for a model with experts: an Arch would count one feed-forward a layer."""
    # DBRX nests the experts.
    places = (fields, fields.get("ffn_config") or {})
    found = {name: place[name] for place in places for name in _EXPERTS if place.get(name)}
    for name, experts in found.items():
        if experts != 1:
            raise ConfigError(
                f"{source}: {name} {experts!r}: layers of experts are not counted yet\n"
                "  why: parameters, memory and seconds would be wrong, those of one feed-forward "
                "block a layer\n"
                "  to fix: the config of a dense model; training needs no counts where --cp names "
                "its plan"
            )


def _gated(fields: dict[str, Any]) -> bool:
    """Whether the MLP has a gate: families of Llama's kind do, those with GPT-2's keys do not."""
    return "intermediate_size" in fields and fields.get("hidden_act") in ("silu", "swish")


def _window(fields: dict[str, Any], source: str) -> int | None:
    """The sliding window where it is on in every layer; layers without one need all keys."""
    if fields.get("sliding_window") is None or fields.get("use_sliding_window") is False:
        return None
    kinds = fields.get("layer_types") or ["sliding_attention"]
    if any(kind != "sliding_attention" for kind in kinds):
        return None
    return _count(fields, source, "sliding_window")


def _count(fields: dict[str, Any], source: str, *names: str, default: Any = _MISSING) -> int:
    value = next((fields[name] for name in names if fields.get(name) is not None), default)
    if value is _MISSING:
        raise ConfigError(f"{source}: no {names[0]} (nor {', '.join(names[1:]) or 'another name'})")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {names[0]} {value!r} is no count of at least 1")
    return value
