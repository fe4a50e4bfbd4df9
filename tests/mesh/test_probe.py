"""The probe: what it measures on virtual and on real ranks, and when it refuses."""

import pytest

from stretto.errors import ConfigError
from stretto.mesh import probe
from stretto.mesh.local import LocalWorld
from tests.fresh import modules_after

VERBS = {"all_gather": 3, "broadcast": 3, "permute": 2, "shift": 3, "all_to_all": 3}
SMALL = {"dtypes": ("fp32",), "sides": (16, 32), "message_bytes": (64, 4096)}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(probe, "COPY_BYTES", 2**20)
    monkeypatch.setattr(probe, "_BUDGET_S", 0.0)


def test_every_rank_sees_the_same_samples():
    world = LocalWorld({"step": 3}, timeout_s=30)
    first, *others = world.run(lambda mesh: probe.measure(mesh, **SMALL))
    assert all(other == first for other in others)
    assert [(p.dtype, p.side) for p in first.products] == [("fp32", 16), ("fp32", 32)]
    assert [(m.verb, m.num_bytes, m.ranks) for m in first.messages] == [
        (verb, num, ranks) for num in (64, 4096) for verb, ranks in VERBS.items()
    ]
    assert all(m.seconds > 0 for m in first.messages)
    assert first.memory_rate > 0


def test_one_rank_has_no_messages():
    found = probe.measure(LocalWorld({}).mesh(0), **SMALL)
    assert found.ranks == 1
    assert found.messages == ()


def test_a_rate_counts_two_operations_per_product_term():
    assert probe.Product("fp32", 100, 2.0).flop_rate == 2 * 100**3 / 2.0


def test_the_slowest_rank_counts(monkeypatch):
    """Three ranks whose every piece of work takes 1, 2 and 3 seconds by their clocks."""
    monkeypatch.setattr(probe, "_timed", lambda mesh, work: 1.0 + mesh.rank("step"))
    found = LocalWorld({"step": 3}, timeout_s=30).run(lambda mesh: probe._repeat(mesh, list))
    assert found == [3.0] * 3


@pytest.mark.parametrize(("load", "cores"), [(1.01, 2), (9.0, 16)])
def test_a_busy_machine_is_refused_with_the_numbers(load, cores):
    with pytest.raises(
        ConfigError, match=rf"load average {load:.2f} on {cores} core.*\n.*\n.*--force"
    ):
        probe.refuse_load(load, cores)


def test_an_idle_machine_is_not_refused():
    probe.refuse_load(1.0, 2)


def test_measuring_needs_only_torch():
    loaded = modules_after("import stretto.mesh.probe", blocked=["pydantic", "yaml"])
    assert "torch" in loaded


@pytest.mark.ranks
def test_real_ranks_over_gloo():
    found = probe.probe(2)
    assert (found.ranks, found.backend) == (2, "gloo") or found.device == "cuda"
    assert {m.num_bytes for m in found.messages} == set(probe.MESSAGE_BYTES)
    assert {p.side for p in found.products} == set(probe.MATRIX_SIDES)
    assert all(m.seconds > 0 for m in found.messages)


def test_ranks_say_what_they_measure():
    told = []
    probe.measure(LocalWorld({}).mesh(0), tell=told.append, **SMALL)
    assert told == ["matmul fp32", "memory copy"]
