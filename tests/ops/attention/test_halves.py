"""Ulysses whose heads go in two halves: what a GPU does, here on virtual ranks of the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stretto.ops.attention import halves
from stretto.plan.context import Context
from stretto.plan.ranges import FULL, Mask
from tests.ops.attention.drawn import Drawn, check
from tests.ops.attention.whole import Inputs, run_whole

CAUSAL = Mask(causal=True)


@pytest.fixture
def halved(monkeypatch):
    """Counts the calls that went in halves; a device that carries messages is pretended."""
    calls = []
    forward = halves.forward

    def counting(job, *tensors):
        calls.append(job)
        return forward(job, *tensors)

    monkeypatch.setattr(halves, "_hides_messages", lambda job: True)
    monkeypatch.setattr(halves, "forward", counting)
    return calls


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("ranks", "heads", "tokens", "mask"),
    [
        (2, (4, 4), 16, CAUSAL),
        (2, (8, 4), 13, CAUSAL),
        (2, (4, 4), 12, FULL),
        (4, (16, 8), 3, CAUSAL),
        (3, (6, 6), 20, CAUSAL),
    ],
)
def test_halves_are_exact_and_send_what_the_plan_says(
    ranks, heads, tokens, mask, layout, return_lse, halved
):
    context = Context(ulysses=ranks, layout=layout)
    inputs = Inputs(tokens, heads=heads, mask=mask, batch=2)
    whole = run_whole(context, inputs, return_lse=return_lse)
    assert len(halved) == ranks
    whole.assert_bytes()
    if return_lse:
        whole.assert_close(inputs)
    else:
        for name, got, right in zip(
            ["dq", "dk", "dv"], whole.results[2:], inputs.expected[2:], strict=True
        ):
            torch.testing.assert_close(got, right, msg=name)


@pytest.mark.parametrize(
    ("context", "heads", "mask"),
    [
        (Context(ulysses=2), (4, 2), CAUSAL),  # one key head each: nothing to halve
        (Context(ulysses=4), (4, 2), CAUSAL),  # heads that two ranks hold
        (Context(ulysses=2), (4, 4), Mask(causal=True, window=5)),  # pieces to merge
        (Context(ulysses=2, ring=2), (4, 4), CAUSAL),
    ],
)
def test_what_cannot_be_halved_goes_in_one(context, heads, mask, halved):
    inputs = Inputs(16, heads=heads, mask=mask)
    run_whole(context, inputs).assert_close(inputs)
    assert not halved


def test_on_the_cpu_heads_go_in_one():
    inputs = Inputs(8, mask=CAUSAL)
    assert not halves._hides_messages(dataclasses.replace(JOB, device=torch.device("cpu")))
    run_whole(Context(ulysses=2), inputs).assert_close(inputs)


JOB = halves.Job(None, None, None, 1.0, torch.float64, torch.device("cuda"))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("differentiated", [("qkvs",), ("q", "k"), ("v",)])
def test_halves_through_the_operator(sinks, differentiated, halved):
    """Autograd takes what is saved apart and puts it together again."""
    call = Drawn(
        Context(ulysses=2),
        tokens=10,
        kv_tokens=10,
        heads=(8, 4),
        head_dim=8,
        batch=2,
        dtype=torch.float64,
        options={"causal": True, "return_lse": True},
        differentiated=differentiated,
        sinks=sinks,
        strides=("rows first", "plain", "every second", "plain"),
        times=2,
    )
    check(call)
    assert halved
