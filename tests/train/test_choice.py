"""What `auto` weighs: states by optimizer and dtype, and the cluster that ranks are taken from."""

import pytest

from stretto.cluster.model import Cluster, Device, Node
from stretto.errors import ConfigError, PlanMismatch
from stretto.train.choice import best_context, ranked, state_bytes
from tests.train.make import ADAMW, SGD, recipe


@pytest.mark.parametrize(
    ("dtype", "descent", "wanted"),
    [
        ("float32", ADAMW, 16),
        ("bfloat16", ADAMW, 16),
        ("float64", ADAMW, 32),
        ("float32", SGD, 8),
    ],
)
def test_states_are_what_the_optimizer_holds(dtype, descent, wanted):
    given = recipe(None, dtype=dtype, descent=descent)
    assert state_bytes(given) == wanted
    assert ranked(given, 2).training.state_bytes == wanted


def test_a_cluster_grows_to_the_ranks_of_a_run():
    context, origin = best_context(recipe(None), 4, 1)
    assert context.degree == 4
    assert "4 devices like those of" in origin.note


def test_one_device_does_not_say_what_two_would_talk_over(tmp_path):
    device = Device(memory=2**34, memory_rate=1e10, fp64=1e11, source="assumed")
    alone = Cluster(
        name="alone",
        basis="projected",
        devices={"cpu": device},
        nodes=(Node(name="here", devices="1 x cpu"),),
    )
    alone.write(tmp_path / "alone.yaml")
    with pytest.raises(ConfigError, match="has 1 device and no link within here"):
        best_context(recipe(None), 2, 1, tmp_path / "alone.yaml")


def test_a_micro_batch_is_priced_as_one_call():
    given = recipe(None, sequences=4)
    one, four = (ranked(given, 2, micro_batch=size) for size in (1, 4))
    assert {choice.plan.dp.micro_batch for choice in four.choices} == {4}
    # Of two groups each has two sequences, no micro-batch of four.
    assert {choice.plan.dp.degree for choice in one.choices} == {1, 2}
    assert {choice.plan.dp.degree for choice in four.choices} == {1}
    calls = {
        name: {c.plan.cp: c.estimate for c in found.choices if c.plan.dp.degree == 1}
        for name, found in (("one", one), ("four", four))
    }
    for context, estimate in calls["four"].items():
        assert 4 * estimate.calls == calls["one"][context].calls
        assert estimate.memory.total > calls["one"][context].memory.total
    with pytest.raises(PlanMismatch, match="micro-batch 3 does not divide 4; legal are 1, 2, 4"):
        best_context(given, 2, 1, micro_batch=3)
