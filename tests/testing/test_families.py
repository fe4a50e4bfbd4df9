"""Tiny configurations: small, of the same kind, with every kind of layer."""

import pytest
import torch

from stretto.testing import families


def test_every_kind_of_layer_is_kept():
    kinds = families.tiny_config("llama4_text").layer_types
    assert set(kinds) == {"chunked_attention", "full_attention"}
    assert set(families.tiny_config("qwen3_next").layer_types) == {
        "linear_attention",
        "full_attention",
    }


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 4), ("mistral", 2), ("gemma", 4)])
def test_grouped_heads_stay_grouped(family, kv_heads):
    config = families.tiny_config(family)
    assert config.num_attention_heads == families.HEADS
    assert config.num_key_value_heads == kv_heads


def test_windows_show_at_a_few_tokens():
    assert families.tiny_config("mistral").sliding_window == families.WINDOW
    assert families.tiny_config("llama4_text").attention_chunk_size == families.WINDOW


def test_models_are_small_float64_and_repeatable():
    one, two = families.tiny_model("llama", seed=3), families.tiny_model("llama", seed=3)
    other = families.tiny_model("llama", seed=4)
    weights = [model.lm_head.weight for model in (one, two, other)]
    assert weights[0].dtype == torch.float64
    assert not one.training
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert sum(parameter.numel() for parameter in one.parameters()) < 500_000
