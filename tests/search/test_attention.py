"""The choice among attention plans: complete, never worse than a named point, honest on memory."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.cluster.model import Cluster
from stretto.cost.train import estimate
from stretto.errors import Infeasible, PlanMismatch
from stretto.plan.context import named_points
from stretto.plan.model import Plan
from stretto.plan.options import Context, Data
from stretto.search import attention as search
from stretto.workload.arch import Arch, read_arch
from stretto.workload.train import Training
from tests.cluster.make import cluster as small_cluster
from tests.cluster.make import device, link, node


def model(heads=8, kv_heads=8, **changes):
    fields = {"name": "m", "layers": 2, "width": heads * 64, "heads": heads, "kv_heads": kv_heads}
    fields |= {"head_dim": 64, "feed_forward": heads * 256, "vocab": 1000}
    return Arch(**fields | changes)


def two_level(nodes, inside, per="device", rate=1e10, memory="80 GiB"):
    names = [f"n{i}" for i in range(nodes)]
    made = small_cluster(
        devices={"d": device(bf16="100 TFLOP/s", memory=memory)},
        nodes=[node(name, "d", inside) for name in names],
        links=[link(within=name, rate=1e11) for name in names]
        + [link(between=(a, b)) for i, a in enumerate(names) for b in names[i + 1 :]],
    ).model_dump()
    made["links"] = made["links"][:nodes]
    network = {"rate": rate, "latency": 1e-5, "per": per}
    return Cluster.model_validate(made | {"network": network})


@given(
    nodes=st.sampled_from([1, 2, 3, 4]),
    inside=st.sampled_from([1, 2, 4]),
    per=st.sampled_from(["device", "node"]),
    rate=st.floats(1e8, 1e12),
    heads=st.sampled_from([(8, 8), (8, 2), (4, 1), (6, 3)]),
    tokens=st.sampled_from([1 << 10, 1 << 14, 1 << 18, 1000]),
    sequences=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 100]),
)
@settings(max_examples=25)
def test_auto_is_never_predicted_worse_than_a_named_point(
    nodes, inside, per, rate, heads, tokens, sequences, window
):
    cluster = two_level(nodes, inside, per, rate)
    training = Training.of(model(*heads), tokens, sequences=sequences, window=window)
    ranking = search.rank_plans(training, cluster)
    best = ranking.choices[0].estimate.seconds
    for dp in (1, sequences):
        ranks, rest = divmod(cluster.size, dp)
        if rest or ranks < 2:
            continue
        for name, context in named_points(ranks, *heads).items():
            plan = Plan(kind="train", dp=Data(shard=dp), cp=context)
            found = estimate(training, cluster, plan)
            assert not found.fits or best <= found.seconds * (1 + search.TIE), name


def test_every_legal_degree_is_looked_at():
    ranking = search.rank_plans(Training.of(model(), 4096), two_level(2, 4))
    everything = [*ranking.choices, *(choice for choice, _ in ranking.dropped)]
    degrees = {(c.plan.cp.ulysses, c.plan.cp.team, c.plan.cp.ring) for c in everything}
    legal = {(u, a, 8 // u // a) for u in (1, 2, 4, 8) for a in (1, 2, 4, 8) if 8 % (u * a) == 0}
    assert degrees == legal
    kinds = {choice.plan.cp.schedule.kind for choice in everything}
    assert kinds == {"tile", "ring", "double-ring", "gather", "startrail"}
    assert {choice.plan.cp.schedule.keep for choice in everything} == {"none", "far", "all"}
    assert all(choice.plan.world_size == 8 for choice in everything)


def test_choices_are_in_order_and_the_best_says_where_it_is_from():
    ranking = search.rank_plans(Training.of(model(), 4096, sequences=4), two_level(2, 2))
    seconds = [choice.estimate.seconds for choice in ranking.choices]
    assert all(a <= b * (1 + search.TIE) for a, b in pairwise(seconds))
    assert ranking.best.origin.by == "find_plans"
    assert {choice.plan.dp.degree for choice in ranking.choices} == {1, 2, 4}
    text = str(ranking)
    assert str(ranking.choices[0].plan) in text


def test_one_sequence_per_device_beats_cutting_them_when_links_are_slow():
    ranking = search.rank_plans(Training.of(model(), 4096, sequences=4), two_level(2, 2, rate=1e8))
    assert ranking.best.dp.degree == 4


def test_few_fast_heads_choose_heads_and_few_heads_choose_rows():
    """Many heads: Ulysses in the node; one key head and a shared interface: something else."""
    h100 = Cluster.read("h100-8x8")
    many = search.rank_plans(Training.of("gpt3-6.7b", 2**18), h100).best.cp
    assert many.ulysses == 8
    few = Training.of(model(4, 1, head_dim=128), 2**18)
    assert search.rank_plans(few, h100).best.cp.ulysses <= 4


def test_behind_one_port_per_node_little_may_cross():
    """2 x 16: StarTrail that keeps what it placed crosses once, and so do heads across nodes."""
    ranking = search.rank_plans(Training.of("gpt3-6.7b", 2**17), Cluster.read("a100-2x16"))
    first = ranking.choices[0].estimate
    ring = next(each for each in ranking.named() if each.name == "ring")
    assert ring.estimate.seconds > 1.7 * first.seconds
    stars = [c for c in ranking.choices if c.plan.cp.schedule.kind == "startrail"]
    assert stars[0].plan.cp.schedule.keep == "far"
    assert stars[0].estimate.seconds < 1.05 * first.seconds
    heads = [c for c in ranking.choices if c.plan.placement and c.plan.cp.ulysses > 1]
    assert heads[0].plan.placement.order[0] == "ulysses"
    assert heads[0].estimate.memory.total < stars[0].estimate.memory.total


@pytest.mark.parametrize(
    ("fields", "layouts"),
    [
        ({}, {"auto"}),
        ({"window": 100}, {"auto", "contiguous"}),  # a window changes no layout of a model
        ({"window": 2000}, {"auto", "contiguous"}),
        ({"documents": (4000, 96)}, {"auto", "zigzag"}),
    ],
)
def test_layouts_are_looked_at_where_the_best_is_not_known(fields, layouts):
    training = Training.of(model(), 4096, **fields)
    ranking = search.rank_plans(training, two_level(2, 4))
    assert {choice.plan.cp.layout for choice in ranking.choices} == layouts


def test_orders_are_looked_at_where_a_sequence_crosses_nodes():
    job = Training.of(model(), 4096, sequences=2)
    crossing = search.candidates(job, two_level(2, 4))
    orders = {(p.dp.degree, p.placement.order[0]) for p, _ in crossing if p.placement}
    assert orders == {(1, "ulysses"), (1, "team_out")}
    assert not [p for p, _ in search.candidates(job, two_level(1, 8)) if p.placement]


def test_nothing_fits_says_by_how_much_and_what_would():
    training = Training.of(model(), 2**20)
    with pytest.raises(Infeasible, match=r"the leanest, .* GiB more .*\n.*sequences of about"):
        search.rank_plans(training, two_level(1, 2, memory="1 GiB"))
    huge = Training.of(read_arch("opt-30b"), 1024)
    with pytest.raises(Infeasible, match="more devices to spread"):
        search.rank_plans(huge, two_level(1, 2, memory="1 GiB"))


def test_degrees_that_do_not_fit_are_named():
    training, cluster = Training.of(model(6, 3), 4096), two_level(2, 4)
    with pytest.raises(PlanMismatch, match="ulysses 4 does not fit 6 query and 3 key/value heads"):
        estimate(training, cluster, Plan(kind="train", cp=Context(ulysses=4, ring=2)))
    with pytest.raises(PlanMismatch, match="for 8 device"):
        estimate(training, cluster, Plan(kind="train", cp=16))
    with pytest.raises(PlanMismatch, match="does not divide the 1 sequences"):
        estimate(training, cluster, Plan(kind="train", dp=2, cp=4))
