"""The preset models: what tokens see, what is counted, recomputation that changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stretto.errors import ConfigError
from stretto.parallel.context import Attention, visible
from stretto.train import shards
from stretto.train.dit import Dit, DitShape
from stretto.train.gpt import Gpt, GptShape, rotary, rotated
from stretto.train.pictures import CAPTION_BYTES, Patterns
from stretto.train.presets import PRESETS, task_of
from stretto.train.recipe import Descent, Recipe
from stretto.train.tasks import causal_pairs
from tests.train.make import recipe, write_text

GPT = GptShape(layers=2, width=32, heads=4, kv_heads=2, hidden=48)
DIT = DitShape(layers=2, width=32, heads=4, patch=16, text=256)


def made(model):
    model.double()
    shards.materialise(model, torch.device("cpu"), seed=1)
    return model


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


def gpt(**kwargs):
    return made(on_meta(Gpt, GPT, **kwargs))


def test_a_document_sees_neither_other_documents_nor_its_future():
    model = gpt()
    tokens, positions = torch.arange(12)[None], torch.tensor([*range(5), *range(7)])
    out = model(tokens, positions, (5, 7))
    alone = model(tokens[:, 5:], positions[5:], (7,))
    assert torch.allclose(out[:, 5:], alone, atol=1e-13)
    tokens[0, 9] = 77
    changed = model(tokens, positions, (5, 7))
    assert torch.equal(changed[:, :9], out[:, :9])
    assert not torch.allclose(changed[:, 9:], out[:, 9:])


def test_a_window_is_what_a_token_sees(tmp_path):
    model = made(on_meta(Gpt, replace(GPT, layers=1, window=4)))
    tokens, positions = torch.arange(12)[None], torch.tensor([*range(5), *range(7)])
    out = model(tokens, positions, (5, 7))
    tokens[0, 6] = 77
    changed = (model(tokens, positions, (5, 7)) != out).any(-1)[0].nonzero().flatten()
    assert changed.tolist() == [6, 7, 8, 9]  # itself and the three that still see it


def test_joined_documents_are_one_per_sequence(tmp_path):
    data = write_text(tmp_path / "t", files=50, size=20)
    given = (recipe(data, documents=each, tokens=640) for each in ("apart", "joined"))
    apart, joined = map(task_of, given)
    first, other = apart.sample(3, 2), joined.sample(3, 2)
    assert first.tokens.equal(other.tokens)
    assert first.labels.equal(other.labels)
    assert len(first.documents) > 2
    assert other.documents == (640, 640)
    assert other.positions.tolist() == [*range(640)] * 2
    assert task_of(recipe(data, tokens=640)).sample(3, 2).documents == first.documents


@pytest.mark.parametrize(("tokens", "window"), [(7, None), (7, 3), (7, 7), (7, 99), (1, 1)])
def test_pairs_are_those_that_are_seen(tokens, window):
    assert causal_pairs(tokens, window) == visible(tokens, tokens, True, window).sum()


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(i, j):
        turn = [rotated(x, rotary(torch.tensor([p]), 8, x.dtype)) for x, p in ((q, i), (k, j))]
        return (turn[0] * turn[1]).sum()

    assert torch.isclose(product(7, 3), product(1007, 1003), rtol=1e-12)
    assert not torch.isclose(product(7, 3), product(7, 4), rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt", "dit"])
def test_recomputation_gives_the_same_gradients_and_attends_once(kind, monkeypatch, tmp_path):
    calls = []
    forward = Attention.forward
    monkeypatch.setattr(
        Attention, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    found = []
    for recompute in (False, True):
        if kind == "gpt":
            model = gpt(recompute=recompute)
            tokens = torch.arange(20)[None]
            loss = model(tokens, torch.arange(20)).square().sum()
        else:
            model = made(on_meta(Dit, DIT, recompute=recompute))
            # Gates start at zero, behind which nothing has a gradient.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05)
            x = Patterns(0).noised(0, 4)
            loss = model(x.patches, x.places, x.noise, x.text).square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))
    assert all(grad.abs().sum() > 0 for grad in found[0])
    assert len(calls) == 2 * 2


@pytest.mark.parametrize("name", ["gpt-tiny", "dit-tiny"])
def test_flops_are_those_that_torch_counts(name, tmp_path):
    data = write_text(tmp_path / "t", files=2, size=2000) if name == "gpt-tiny" else None
    task = task_of(recipe(data, model=name, tokens=256))
    model = task.model().to(torch.float64)
    shards.materialise(model, torch.device("cpu"), 0)
    sample = task.sample(0)
    with FlopCounterMode(display=False) as counter:
        task.loss(model, sample).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if "mm" in str(op))
    shape = task.shape
    # Ours leave out time and text, torch's the gradient of what has none (the patches).
    assert 3 * 2 * shape.multiplied * 256 == pytest.approx(products, rel=0.05)
    pairs = 256 * 257 // 2 if name == "gpt-tiny" else 256 * (256 + CAPTION_BYTES)
    attention = 3 * 2 * 2 * shape.layers * shape.width * pairs
    assert task.flops(sample) - 3 * 2 * shape.multiplied * 256 == attention


def test_first_values_depend_on_seed_and_name_alone():
    first, again = gpt(), gpt()
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    other = on_meta(Gpt, GPT).double()
    shards.materialise(other, torch.device("cpu"), seed=2)
    assert not torch.equal(other.head.weight, first.head.weight)
    weights = [p for p in first.parameters() if p.ndim == 2]
    assert len({w.flatten()[0].item() for w in weights}) == len(weights)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_split_over_ranks(name):
    shape = PRESETS[name].shape
    assert shape.width % shape.heads == 0
    assert shape.head_dim % 8 == 0  # what flash kernels take
    assert shape.heads % 4 == 0


def test_pictures_are_functions_of_seed_and_number():
    first, again = Patterns(0).noised(3, 4, count=2), Patterns(0).noised(4, 4)
    assert first.patches[1:].equal(again.patches)
    assert first.patches.shape == (2, 16, 16)
    assert not Patterns(1).noised(3, 4).patches.equal(first.patches[:1])
    assert not Patterns(0, split=1).noised(3, 4).patches.equal(first.patches[:1])
    # x = latent + share * velocity, and what is left is a wave between -1 and 1.
    latent = first.patches - first.noise[:, None, None] * first.velocity
    assert latent.abs().max() <= 1 + 1e-12
    assert bytes(first.text[0].tolist()).startswith(b"waves at ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "gpt-tinny"}, "did you mean 'gpt-tiny'"),
        ({"model": "dit-tiny", "tokens": 250}, "give 225 or 256"),
        ({"model": "dit-tiny", "tokens": 256, "data": "x"}, "reads no text"),
        ({"model": "dit-tiny", "tokens": 256, "window": 8}, "reads no text, --window 8 is of text"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"documents": "some"}, "documents 'some' is unknown; known are apart, joined"),
        ({"window": 0}, "window=0: a whole number, at least 1"),
        ({"tokens": 64.5}, "tokens=64.5: a whole number"),
        ({"sequences": None}, "sequences=None: a whole number"),
        ({"seed": "x"}, "seed 'x': from 0 to"),
        ({"seed": -1}, "seed -1: from 0 to"),
        ({"seed": 2**63}, "from 0 to 9223372036854775807"),
        ({"tokens": 10**12}, r"--tokens \d+ or fewer"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_what_cannot_be_trained_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        task_of(Recipe(**fields))


@pytest.mark.parametrize("name", ["rate", "weight_decay", "clip"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, "x"])
def test_a_descent_of_no_numbers_is_refused(name, value):
    with pytest.raises(ConfigError, match="all of them finite"):
        Descent(**{name: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"final": -1.0}, "final -1.0: the part of the rate"),
        ({"final": float("nan")}, "final nan"),
        ({"warmup": 1.5}, "warmup 1.5: it counts steps"),
        ({"warmup": True}, "warmup True"),
        ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\): two numbers"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
    ],
)
def test_a_descent_without_sense_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Descent(**fields)
