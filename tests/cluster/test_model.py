"""Clusters: presets, files, and the link between any two ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.cluster.model import Cluster, presets
from stretto.errors import ConfigError
from tests.cluster.make import cluster, device, link, node


@pytest.mark.parametrize("name", presets())
def test_presets_say_where_every_number_is_from(name):
    preset = Cluster.read(name)
    kernels = [each.attention for each in preset.devices.values() if each.attention]
    network = [preset.network] if preset.network else []
    sources = [each.source for each in (*preset.devices.values(), *kernels, *preset.links)]
    sources += [each.source for each in network]
    assert sources
    assert all(s.startswith(("measured: ", "published: ", "projected: ")) for s in sources)
    assert preset.size >= 2


def test_two_presets_and_a_measured_one_exist():
    assert {Cluster.read(name).basis for name in presets()} == {
        "measured",
        "published",
        "projected",
    }


def test_ranks_count_through_nodes_in_order():
    mixed = cluster(
        {"big": device(), "small": device()},
        [node("a", "big", 2), node("b", "small", 1)],
        [link(within="a", rate=2e9), link(between=("b", "a"), rate=1e9)],
    )
    assert mixed.places == (("a", "big"), ("a", "big"), ("b", "small"))
    assert mixed.link(0, 1).name == "within a"
    assert mixed.link(0, 2) == mixed.link(2, 1)
    assert mixed.link(0, 2).rate == 1e9


def test_a_network_joins_the_nodes_that_no_link_joins():
    two = Cluster.read("a100-2x16")
    assert (two.size, two.link(0, 15).name) == (32, "within n0")
    assert two.link(20, 3) == two.link(3, 20)
    assert two.link(3, 20).rate == two.network.rate == 12.5e9
    own = {"between": ("n0", "n1"), "rate": 1e9, "latency": 0}
    fields = two.model_dump() | {"links": [*two.model_dump()["links"], own]}
    assert Cluster.model_validate(fields).link(0, 31).rate == 1e9


@pytest.mark.parametrize(
    ("short", "match"),
    [([[2048, 1, 1], [1024, 0.5, 0.5]], "must rise"), ([[1024, 1, 1.5]], "not above 1")],
)
def test_a_kernel_curve_is_checked(short, match):
    rates = {"forward": "1 TFLOP/s", "backward": "1 TFLOP/s", "source": "invented"}
    with pytest.raises(ConfigError, match=match):
        cluster({"d": device(attention=rates | {"short": short})})


def test_cut_down_keeps_the_links_that_are_left():
    two = cluster(
        nodes=[node("a", "d", 2), node("b", "d", 2)],
        links=[link(within="a"), link(within="b"), link(between=("a", "b"))],
    )
    assert two.first(3).places == two.places[:3]
    assert two.first(2).links == (two.links[0],)
    with pytest.raises(ConfigError, match="5 devices of test, which has 4"):
        two.first(5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"links": []}, "0 links within n, exactly one is needed"),
        ({"links": [link(within="n")] * 2}, "2 links within n"),
        ({"links": [link(within="n"), link(within="m")]}, "unknown node m"),
        ({"nodes": [node("n", "e", 2)]}, "unknown device 'e', known are d"),
        ({"nodes": [node("n", "d", 0)]}, "0 devices, at least 1"),
        ({"nodes": [node("n", "d", 2)] * 2}, "names repeat"),
        ({"nodes": [{"name": "n", "devices": "two d"}]}, "not of the form '8 x NAME'"),
        ({"nodes": []}, "nodes"),
        ({"links": [link()]}, "either `within` one node or `between` two"),
        ({"links": [link(within="n", rate="0 GB/s")]}, "greater than 0"),
        ({"links": [link(within="n", displaces=-0.1)]}, "displaces: .*greater than or equal to 0"),
        ({"links": [link(within="n", displaces=2.5)]}, "displaces: .*less than or equal to 2"),
        ({"links": [link(between=("a", "b"), displaces=1)]}, "only a link within a node has that"),
        ({"devices": {"d": device(memory="0 B")}}, "memory: .*greater than 0"),
        ({"devices": {"d": device(memory_rate="0 B/s")}}, "memory_rate: .*greater than 0"),
    ],
)
def test_contradictions_are_named(changes, match):
    with pytest.raises(ConfigError, match=match):
        cluster(**changes)


def test_an_unknown_name_lists_presets():
    with pytest.raises(ConfigError, match=r"no preset 'h200'\n.*h100-x8"):
        Cluster.read("h200")


def test_an_unknown_rate_lists_the_known():
    with pytest.raises(ConfigError, match=r"no fp8 rate of this device is known .*: fp32"):
        cluster().device(0).flop_rate("fp8")


@given(
    memory=st.integers(1, 2**50),
    rate=st.floats(1, 1e15),
    latency=st.floats(0, 10),
    spread=st.none() | st.floats(0, 5),
    count=st.integers(1, 1000),
    displaces=st.floats(0, 2),
)
def test_round_trip(tmp_path_factory, memory, rate, latency, spread, count, displaces):
    made = cluster(
        {"d": device(memory=memory, memory_rate=rate, bf16=rate, spread=spread)},
        [node("n", "d", count)],
        [
            link(
                within="n",
                rate=rate,
                latency=latency,
                spread=spread,
                duplex="half",
                displaces=displaces,
            )
        ],
    )
    path = tmp_path_factory.mktemp("cluster") / "c.yaml"
    made.write(path)
    assert Cluster.read(path) == made
