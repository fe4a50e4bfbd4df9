"""Training workloads: presets, config files, round trips, and what is refused."""

import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.errors import ConfigError
from stretto.workload.arch import PRESETS, Arch, from_config, read_arch
from stretto.workload.model import Workload, read_workload
from stretto.workload.train import Training

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt3-1.3b", 1.3), ("gpt3-6.7b", 6.7), ("gpt3-13b", 13), ("opt-30b", 30), ("llama3-8b", 8.0)],
)
def test_published_sizes(name, billions):
    assert PRESETS[name].parameters / 1e9 == pytest.approx(billions, rel=0.05)


def test_the_trainers_presets_are_the_same_models():
    from stretto.train import presets
    from stretto.train.gpt import GptShape

    for name, preset in presets.PRESETS.items():
        shape = preset.shape
        if not isinstance(shape, GptShape):
            continue
        arch = PRESETS[name]
        ours = (arch.layers, arch.width, arch.heads, arch.kv_heads, arch.feed_forward, arch.vocab)
        theirs = (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.hidden)
        assert ours == (*theirs, shape.vocabulary)
        assert arch.layers * arch.layer_parameters + arch.head_parameters == shape.multiplied


def test_a_config_file_or_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    arch = read_arch(tmp_path)
    assert arch == read_arch(tmp_path / "config.json")
    preset = PRESETS["llama3-8b"]
    for name in ("layers", "width", "heads", "kv_heads", "head_dim", "feed_forward", "parameters"):
        assert getattr(arch, name) == getattr(preset, name)


@pytest.mark.parametrize(
    "experts",
    [
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {"num_experts": 128, "moe_intermediate_size": 768},
        {"n_routed_experts": 64, "n_shared_experts": 2},
        {"ffn_config": {"moe_num_experts": 16}},
    ],
)
def test_experts_are_refused_and_not_miscounted(experts):
    with pytest.raises(ConfigError, match=r"config: \w+_experts \d+: layers of experts"):
        from_config(LLAMA | experts)
    with pytest.raises(ConfigError, match="layers of experts are not counted"):
        from_config({"text_config": LLAMA | experts})


@pytest.mark.parametrize("none", [{"num_experts": None}, {"num_experts": 0}, {"num_experts": 1}])
def test_a_single_expert_is_a_dense_layer(none):
    assert from_config(LLAMA | none) == from_config(LLAMA)


def test_other_families_keys():
    gpt2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 10, "model_type": "gpt2"}
    arch = from_config(gpt2)
    assert (arch.kv_heads, arch.head_dim, arch.feed_forward, arch.mlp_matrices) == (4, 16, 256, 2)
    assert from_config(LLAMA | {"head_dim": 64}).head_dim == 64
    nested = from_config({"text_config": LLAMA, "vision_config": {}})
    assert nested.layers == 32


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, None),
    ],
)
def test_a_window_counts_where_every_layer_has_it(changes, window):
    assert from_config(LLAMA | changes).window == window


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_attention_heads": None}, "config: no num_attention_heads"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers 'many' is no count"),
        ({"num_key_value_heads": 5}, "32 query heads are no multiple of 5"),
        ({"vocab_size": 0}, "vocab_size 0 is no count"),
    ],
)
def test_configs_that_do_not_fit(changes, match):
    with pytest.raises(ConfigError, match=match):
        from_config(LLAMA | changes)


def test_unknown_models_list_presets(tmp_path):
    with pytest.raises(ConfigError, match=r"no preset 'gpt-9'\n.*gpt3-6.7b"):
        read_arch("gpt-9")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="as JSON"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds list"):
        read_arch(tmp_path)


@given(
    tokens=st.integers(1, 2**30),
    sequences=st.integers(1, 64),
    dtype=st.sampled_from(["bf16", "fp16", "fp32", "fp64"]),
    window=st.none() | st.integers(1, 1000),
)
def test_round_trip(tmp_path_factory, tokens, sequences, dtype, window):
    made = Workload.train("gpt-tiny", tokens, sequences=sequences, dtype=dtype, window=window)
    path = tmp_path_factory.mktemp("w") / "w.yaml"
    made.write(path)
    assert read_workload(path) == made


def test_either_kind_of_file(tmp_path):
    path = tmp_path / "w.yaml"
    generation = Workload.denoise(4, evaluation_seconds=1.0, guided_bytes=10)
    generation.write(path)
    assert read_workload(path) == generation
    path.write_text("stretto: workload/1\nkind: serve\n")
    with pytest.raises(ConfigError, match="kind 'serve' is unknown; known are denoise, train"):
        read_workload(path)
    assert "train" in typing.get_args(Training.model_fields["kind"].annotation)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"documents": (3, 4)}, "lengths sum to 7, a sequence has 8 tokens"),
        ({"documents": (-1, 9)}, "documents: -1 tokens in one of them"),
        ({"window": 0}, "window"),
        ({"sequences": 0}, "sequences"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_contradictions_are_named(fields, match):
    with pytest.raises(ConfigError, match=match):
        Workload.train("gpt-tiny", 8, **fields)


def test_the_narrower_window_holds():
    arch = Arch(
        name="m", layers=1, width=8, heads=1, kv_heads=1, head_dim=8, feed_forward=8, vocab=8,
        window=100,
    )  # fmt: skip
    assert Workload.train(arch, 8).seen == 100
    assert Workload.train(arch, 8, window=50).seen == 50
    assert Workload.train(arch, 8, dtype="fp64").scalar_bytes == 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": 0}, "m: layers=0: a whole number, at least 1"),
        ({"heads": 2.5}, "m: heads=2.5"),
        ({"kv_heads": 0}, "m: kv_heads=0"),
        ({"vocab": -1}, "m: vocab=-1: a whole number, at least 0"),
        ({"window": 0}, "m: window=0"),
        ({"kv_heads": 3}, "m: 4 query heads are no multiple of 3 key heads"),
    ],
)
def test_an_arch_of_no_counts_is_refused(changes, match):
    sizes = {"layers": 1, "width": 8, "heads": 4, "kv_heads": 2, "head_dim": 2}
    with pytest.raises(ConfigError, match=match):
        Arch(**({"name": "m", **sizes, "feed_forward": 8, "vocab": 8} | changes))
