"""Nodes that are one host: its work adds up beside the wires; devices with links are unaffected."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto import axes
from stretto.bench.links_cases import NO_TIME, Call, Layout, Rates
from stretto.cluster.model import Cluster
from stretto.cost.attention_bytes import Term
from stretto.cost.attention_host import Cost, Host, SharedHost, arriving, step_seconds
from stretto.cost.attention_links import cost_of, fabric_of
from stretto.cost.attention_work import step_pairs
from stretto.cost.train import call_of, estimate
from stretto.plan.context import named_points
from stretto.plan.model import Plan
from stretto.plan.options import Context, Tile
from stretto.plan.ranges import Mask
from stretto.search.attention import rank_plans

BLOCK = 8 * 8 * 8 * 128


def host(overlap=1.0, step=0.0, merge_rate=1e30, add_rate=1e30):
    return Host(overlap=overlap, step=step, merge_rate=merge_rate, add_rate=add_rate)


def rates(**changed):
    known = {"network": 3e6, "inside": 1e8, "latency_inside": 1e-3, "latency_across": 1e-3}
    known |= {"step": 1e-3, "merge_rate": 1e8, "add_rate": 1e9, "overlap": 0.9}
    return Rates(**known | changed)


def test_devices_with_links_of_their_own_have_no_host():
    fabric = fabric_of(Cluster.read("h100-8x8"))
    assert fabric.host is None
    assert step_seconds(None, named_points(8, 8, 8)["ring"], None, 8, back=False) == 0
    assert Cost(work=5.0, wire=2.0).seconds(None, more=7.0) == 2.0


@pytest.mark.parametrize(
    ("overlap", "more", "right"),
    [(1, 0, 3.0), (0, 0, 5.0), (0.5, 0, 4.0), (1, 2, 4.0), (0, 2, 7.0)],
)
def test_work_and_wire_hide_one_another_as_far_as_was_measured(overlap, more, right):
    assert Cost(work=2.0, wire=3.0).seconds(host(overlap), more) == right


def test_messages_inside_a_node_are_work_and_those_across_wire():
    cluster = rates().cluster(Layout(2, 2), NO_TIME)
    assert isinstance(cluster.first(4), SharedHost)
    fabric = fabric_of(cluster)
    sizes = axes.ordered(Context(ring=4, schedule=Tile(ring_inner=2)).sizes)
    inner = cost_of(Term("column", "exchange", "ring_in", 10**6, 1), sizes, fabric)
    outer = cost_of(Term("column", "exchange", "ring_out", 3 * 10**6, 1), sizes, fabric)
    assert inner == pytest.approx((1e-3 + 1e-2, 0.0))
    # Both ranks of a node send through its interface.
    assert outer == pytest.approx((1e-3, 2.0))


def test_on_one_host_messages_are_its_work_and_displace_nothing_else():
    fabric = fabric_of(rates().cluster(Layout(2, 2), NO_TIME))
    inside = fabric.inside.model_copy(update={"displaces": 1.0})
    sizes = axes.ordered(Context(ring=4, schedule=Tile(ring_inner=2)).sizes)
    inner = Term("column", "exchange", "ring_in", 10**6, 1)
    assert cost_of(inner, sizes, replace(fabric, inside=inside)) == cost_of(inner, sizes, fabric)


def test_merging_and_adding_are_work_of_the_receiver():
    sizes = axes.ordered(Context(team=4).sizes)
    known = host(merge_rate=10.0, add_rate=100.0)
    assert arriving(Term("row-out", "exchange", "team", 5), sizes, known) == 1.5
    assert arriving(Term("back-row-out", "exchange", "team", 5), sizes, known) == 0.15
    assert arriving(Term("team", "exchange", "team", 5), sizes, known) == 0


def test_a_step_adds_as_many_rows_as_its_team_has():
    points, call = named_points(16, 8, 8), Call(8)
    known = host(step=1.0, merge_rate=BLOCK, add_rate=BLOCK)
    training = call.training(16)

    def step(name, steps=4, back=False):
        context = points[name]
        return step_seconds(known, context, call_of(training, context), steps, back=back)

    assert step("ring") == 2.0
    assert step("tile(4)") == 5.0
    # With one step nothing is merged.
    assert step("tile(4)", steps=1) == 1.0
    # dQ of a team's rows, dK and dV of one rank's, or of a team's where keys were gathered.
    assert step("tile(4)", back=True) == 1 + 4 + 2
    assert step("startrail(4)", back=True) == 1 + 4 + 8


@given(
    st.sampled_from([Layout(2, 4), Layout(4, 4), Layout(8, 2)]),
    st.sampled_from([Call(8), Call(2)]),
    st.floats(0, 1),
)
def test_less_overlap_never_makes_a_plan_faster_and_the_interval_holds_it(layout, call, overlap):
    training = call.training(layout.ranks)
    free, less = (rates(overlap=w).cluster(layout, 1e9) for w in (1.0, overlap))
    for context in named_points(layout.ranks, call.heads, call.kv_heads).values():
        plan = Plan(kind="train", cp=context)
        one, other = (estimate(training, cluster, plan) for cluster in (free, less))
        assert one.seconds <= other.seconds * (1 + 1e-9)
        low, high = other.interval
        assert low <= other.seconds * (1 + 1e-9)
        assert other.seconds <= high * (1 + 1e-9)


def test_where_every_step_costs_cores_the_choice_has_fewer_of_them():
    """Links that need little: the choice is made by the host's work alone."""
    layout, call = Layout(4, 4), Call(2)
    quick, slow = (
        rank_plans(call.training(16), rates(network=1e9, step=step).cluster(layout, NO_TIME))
        for step in (0.0, 0.1)
    )
    steps = [
        len(step_pairs(found.choices[0].plan.cp, 8 * 16, Mask(causal=True)))
        for found in (quick, slow)
    ]
    assert steps[1] <= steps[0]
    assert steps[1] == 1


def test_a_host_is_read_back_as_it_was_written(tmp_path):
    cluster = rates().cluster(Layout(2, 2), 1e9)
    cluster.write(tmp_path / "host.yaml")
    assert SharedHost.read(tmp_path / "host.yaml").host == cluster.host
