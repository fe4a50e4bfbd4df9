"""Calls drawn at random over plans, layouts, masks, strides and dtypes, against one device."""

import dataclasses

import pytest
import torch

from stretto.plan.context import Context, StarTrail
from tests.ops.attention.drawn import Drawn, check, draw


@pytest.mark.parametrize("seed", range(60))
def test_drawn_calls(seed):
    check(draw(seed, most_ranks=8))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 11000, 500))
def test_many_drawn_calls(first):
    for seed in range(first, first + 500):
        check(draw(seed))


CALL = Drawn(
    Context(team=2, ring=2),
    tokens=10,
    kv_tokens=14,
    heads=(4, 2),
    head_dim=8,
    batch=1,
    dtype=torch.float64,
    options={"causal": True, "window": 3, "q_offset": 4, "return_lse": True},
    differentiated=("qkvs",),
    sinks=True,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [{"window": 4}, {"q_offset": 3}, {"scale": 0.4}, {"causal": False}])
def test_a_wrong_option_is_noticed(odd, dtype, monkeypatch):
    call = dataclasses.replace(CALL, dtype=dtype)
    check(call)
    other = dataclasses.replace(call, options=call.options | odd)
    monkeypatch.setattr(Drawn, "expected", lambda self, dtype: truth(other, dtype))
    with pytest.raises(AssertionError, match="is off by"):
        check(call)


truth = Drawn.expected


@pytest.mark.parametrize(
    "context", [Context(team=3), Context(team=2, ring=2, schedule=StarTrail())]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_of_an_odd_size(context, dtype):
    """Statistics then lie first or last by the number of rows, which differs among ranks."""
    check(Drawn(context, tokens=5, kv_tokens=5, heads=(3, 3), head_dim=1, batch=1, dtype=dtype))
