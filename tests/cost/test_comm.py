"""Collectives on links, by hand, and the fit that turns samples into a link."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.cost.comm import Path, groups, hops, links_of, paths
from stretto.cost.fit import fit_link
from stretto.plan.model import Plan
from tests.cluster.make import cluster, device, line, link, node


@dataclass(frozen=True)
class Sample:
    verb: str
    num_bytes: int
    ranks: int
    seconds: float


def samples(rate, latency, noise=0.0, ranks=4):
    """Messages that a link of this rate and latency carries, each off by up to `noise`."""
    chance = random.Random(0)
    return [
        Sample(
            verb, n, r, hops(verb, r) * (latency + n / rate) * (1 + chance.uniform(-1, 1) * noise)
        )
        for verb, r in (("all_gather", ranks), ("broadcast", ranks), ("permute", 2))
        for n in (1024 * 4**k for k in range(8))
    ]


def test_collectives_by_hand():
    path = Path(line(4).links[0], sharing=1)  # 1 GB/s, 10 us
    assert path.seconds("all_gather", 3e6, 4) == pytest.approx(3e-3 + 3e-5)
    assert path.seconds("broadcast", 3e6, 4) == pytest.approx(2 * (1e-3 + 1e-5))
    assert path.seconds("permute", 1e6, 4) == pytest.approx(1e-3 + 1e-5)
    assert path.seconds("shift", 1e6, 4) == pytest.approx(1e-3 + 1e-5)
    assert path.seconds("all_to_all", 3e6, 4) == pytest.approx(3e-3 + 3e-5)


def test_half_duplex_and_sharing_divide_the_rate():
    half = line(2, duplex="half").links[0]
    assert Path(half, sharing=3).rate == pytest.approx(1e9 / 6)


def test_groups_follow_mesh_order():
    assert groups(Plan(step=2, cfg=2), "cfg") == [(0, 1), (2, 3)]
    assert groups(Plan(step=2, cfg=2), "step") == [(0, 2), (1, 3)]
    assert groups(Plan(step=2), "cfg") == []


def test_columns_share_the_link_between_nodes():
    two = cluster(
        {"d": device()},
        [node("a", "d", 2), node("b", "d", 2)],
        [link(within="a"), link(within="b"), link(between=("a", "b"), rate="10 MB/s")],
    )
    plan = Plan(step=2, cfg=2)
    assert [(p.link.name, p.sharing) for p in paths(two, plan, "step")] == [("a - b", 2)]
    assert [p.sharing for p in paths(two, plan, "cfg")] == [1, 1]
    assert [k.name for k in links_of(two, [0, 1, 2])] == ["within a", "a - b"]


@given(st.floats(1e5, 1e12), st.floats(1e-7, 1e-1), st.integers(2, 9))
def test_fit_finds_what_made_the_samples(rate, latency, ranks):
    found = fit_link(samples(rate, latency, ranks=ranks))
    assert found.spread < 1e-6
    small, large = latency + 1024 / rate, latency + 1024 * 4**7 / rate
    assert found.latency + 1024 / found.rate == pytest.approx(small, rel=1e-5)
    assert found.latency + 1024 * 4**7 / found.rate == pytest.approx(large, rel=1e-5)


def test_fit_reports_its_own_error():
    found = fit_link(samples(1e9, 1e-4, noise=0.2))
    assert found.rate == pytest.approx(1e9, rel=0.2)
    assert found.latency == pytest.approx(1e-4, rel=0.2)
    assert 0.02 < found.spread < 0.2


def test_fit_is_never_negative():
    falling = [Sample("permute", 1024, 2, 2.0), Sample("permute", 4096, 2, 1.0)]
    found = fit_link(falling)
    assert found.rate > 0
    assert found.latency >= 0
    super_linear = [Sample("permute", 1000, 2, 0.5), Sample("permute", 4000, 2, 4.0)]
    assert fit_link(super_linear).latency == 0
