"""The option of the cp axis: a frozen surface, named points, and errors that list what is legal."""

import dataclasses
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.errors import PlanMismatch, ShapeError
from stretto.plan.context import (
    AttentionCase,
    Context,
    DoubleRing,
    Gather,
    Ring,
    Schedule,
    StarTrail,
    Tile,
    forward_blocks,
    legal_ulysses,
    named_points,
)
from stretto.plan.model import Plan
from stretto.plan.options import Data, DataCase
from stretto.plan.ranges import Mask
from stretto.plan.traffic import Traffic

OPTIONS = (Context, Data, *typing.get_args(Schedule))


def test_the_surface_is_frozen():
    """A new field is a decision: it is written here by hand."""
    assert {f"{kind.__name__}.{f.name}" for kind in OPTIONS for f in dataclasses.fields(kind)} == {
        "Context.ulysses",
        "Context.team",
        "Context.ring",
        "Context.schedule",
        "Context.layout",
        "Data.replicate",
        "Data.shard",
        "Data.micro_batch",
        "Data.reduce_dtype",
        "Ring.kind",
        "Ring.circulate",
        "Ring.gradients",
        "Ring.prune",
        "Ring.keep",
        "Ring.grad_wire",
        "DoubleRing.kind",
        "DoubleRing.inner",
        "DoubleRing.prune",
        "DoubleRing.keep",
        "DoubleRing.grad_wire",
        "Gather.kind",
        "Gather.keep",
        "StarTrail.kind",
        "StarTrail.circulate",
        "StarTrail.keep",
        "Tile.kind",
        "Tile.team_inner",
        "Tile.ring_inner",
        "Tile.prune",
        "Tile.keep",
        "Tile.grad_wire",
    }


def test_kinds_differ():
    kinds = [typing.get_type_hints(branch)["kind"] for branch in typing.get_args(Schedule)]
    assert len(set(map(str, kinds))) == 5


def test_degrees_become_axes():
    sizes = {"ring_out": 1, "team_out": 1, "ring_in": 1, "team_in": 1, "ulysses": 1}
    assert Context().sizes == sizes
    assert Context(ulysses=2, ring=3).sizes == sizes | {"ulysses": 2, "ring_out": 3}
    tile = Context(team=4, ring=6, schedule=Tile(team_inner=2, ring_inner=3))
    assert list(tile.sizes.values()) == [2, 2, 3, 2, 1]
    assert tile.degree == 24
    assert tile.levels("ring") == (("ring_out", 2), ("ring_in", 3))
    assert Context(team=4, ring=6).levels("team") == (("team", 4),)


BAD = [
    ({"ring": 0}, "ring=0: a degree counts ranks"),
    ({"ring": 2, "layout": "spiral"}, "layout 'spiral' is unknown; known are auto, zigzag"),
    ({"ring": 3, "layout": (((0, 4),),)}, "ranges for 1 ranks, the plan has 3"),
    ({"team": 4, "ring": 2, "schedule": StarTrail()}, r"legal teams are 1, 2\n"),
    ({"team": 2, "ring": 2, "schedule": Ring()}, "has no team, got team=2"),
    ({"ring": 8, "schedule": DoubleRing(inner=3)}, "legal are 1, 2, 4, 8"),
    ({"team": 4, "schedule": Tile(team_inner=3)}, "team_inner 3 does not divide 4"),
    ({"ring": 4, "schedule": Tile(ring_inner=3)}, "ring_inner 3 does not divide 4"),
]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ring": 1.5}, "ring=1.5: a degree counts ranks, as an int"),
        ({"ring": True}, "ring=True: a degree"),
        ({"ring": 2, "schedule": "ring"}, "schedule 'ring' is a str; expected Ring"),
        ({"ring": 2, "layout": ((0, 4), (4, 8))}, "ranges of every rank, each"),
        ({"ring": 2, "layout": 3}, "layout 3: ranges of every rank"),
        ({"layout": ((("a", "b"),),)}, r"layout: range \('a', 'b'\); it runs"),
        ({"layout": (((0.0, 4.0),),)}, r"layout: range \(0.0, 4.0\); it runs"),
        ({"layout": (((4, 0), (4, 8)),)}, r"layout: range \(4, 0\); it runs"),
        ({"layout": (((-4, 4),),)}, r"layout: range \(-4, 4\); it runs"),
    ],
)
def test_a_field_of_another_type_is_refused(fields, words):
    with pytest.raises(PlanMismatch, match=words):
        Context(**fields)


def test_ranges_may_be_given_as_lists():
    lists = Context(ring=2, layout=[[[0, 4]], [[4, 8]]])
    assert lists == Context(ring=2, layout=(((0, 4),), ((4, 8),)))
    assert hash(lists)


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_what_does_not_fit_is_said_with_what_does(fields, words):
    with pytest.raises(PlanMismatch, match=words):
        Context(**fields)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Ring, "circulate"),
        (Ring, "gradients"),
        (Ring, "keep"),
        (Ring, "grad_wire"),
        (Gather, "keep"),
        (StarTrail, "circulate"),
        (StarTrail, "keep"),
        (Tile, "keep"),
        (Tile, "grad_wire"),
    ],
)
def test_words_come_from_a_list(kind, field):
    with pytest.raises(PlanMismatch, match=rf"{field} 'sideways' is unknown; known are "):
        kind(**{field: "sideways"})


@pytest.mark.parametrize("make", [Ring, Tile, lambda **f: DoubleRing(inner=2, **f)])
def test_a_word_is_no_flag(make):
    with pytest.raises(PlanMismatch, match="prune='no' is a str; expected True or False"):
        make(prune="no")


def test_heads_that_cannot_be_split_name_the_degrees_that_can():
    with pytest.raises(PlanMismatch) as error:
        Context(ulysses=8).check_heads(20, 20)
    assert "ulysses 8 does not fit 20 query and 20 key/value heads" in str(error.value)
    assert "ulysses 4 x ring 2 (5 blocks forward)" in str(error.value)
    Context(ulysses=4, ring=2).check_heads(20, 20)


@given(u=st.integers(1, 16), groups=st.integers(1, 8), per=st.integers(1, 4))
def test_legal_heads_give_every_rank_whole_ones(u, groups, per):
    heads = groups * per
    legal = u in legal_ulysses(heads, groups, u * 2)
    if not legal:
        assert heads % u or (groups % u and u % groups)
        return
    # The query heads of every rank read the key heads that it holds.
    held = max(1, groups // u)
    for rank in range(u):
        first = rank * groups // u
        queries = range(rank * heads // u, (rank + 1) * heads // u)
        assert {q // per for q in queries} == set(range(first, first + held))


# ---- names --------------------------------------------------------------------------------------


def test_names_of_the_brief():
    assert Context.named("ring", 8).sizes["ring_out"] == 8
    assert Context.named("double-ring(4)", 8).schedule == DoubleRing(inner=4, prune=False)
    assert Context.named("kv-allgather", 8).schedule == Gather()
    assert Context.named("ulysses", 8) == Context(ulysses=8)
    assert Context.named("usp(2)", 8).ring == 4
    assert Context.named("startrail(2)", 8).schedule == StarTrail()
    assert Context.named("tile(4)", 8) == Context(team=4, ring=2)
    assert Context.named("ulysses(2) x tile(2)", 8) == Context(ulysses=2, team=2, ring=2)
    assert Context.named("pass-q", 8) == Context(team=8)


@pytest.mark.parametrize("name", ["star", "tile", "ring(2)", "startrail()", "Ring", None, 8])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(PlanMismatch, match=r"plan (is named|name) .*; known are ring, "):
        Context.named(name, 8)


@pytest.mark.parametrize("name", ["usp(3)", "tile(5)", "ulysses(3) x tile(2)"])
def test_a_degree_that_does_not_divide_lists_those_that_do(name):
    with pytest.raises(PlanMismatch, match="does not divide 8; legal are 1, 2, 4, 8"):
        Context.named(name, 8)


@given(ranks=st.integers(1, 64), heads=st.sampled_from([(8, 8), (32, 8), (12, 3), (1, 1)]))
def test_named_points_are_legal_and_use_all_ranks(ranks, heads):
    points = named_points(ranks, *heads)
    assert {"ring", "kv-allgather", "pass-q"} <= set(points)
    for name, context in points.items():
        assert context.degree == ranks
        assert Context.named(name, ranks) == context
        context.check_heads(*heads)
        assert math.prod(context.sizes.values()) == ranks


def test_blocks_of_the_published_comparison():
    """P = 64, multi-head: Ulysses 8, team 2, ring 4 sends 11.5 - 2 row blocks less scalars."""
    assert forward_blocks(8, 2, 4, 64, 64) == 11.5
    assert forward_blocks(1, 1, 64, 64, 64) == 126
    assert forward_blocks(8, 1, 8, 64, 64) == 17.5


# ---- cases, plans, data --------------------------------------------------------------------------


def test_a_case_shards_by_the_layout():
    case = AttentionCase.of(
        Context(ring=2), tokens=8, heads=(2, 1), head_dim=4, mask=Mask(causal=True)
    )
    assert [rows.spans for rows in case.q_rows] == [((0, 2), (6, 8)), ((2, 6),)]
    assert case.kv_rows == case.q_rows
    assert (case.at(1).rank, case.stat_bytes) == (1, 4)
    with pytest.raises(ShapeError, match="no q_offset"):
        AttentionCase.of(
            Context(), tokens=8, kv_tokens=9, heads=(1, 1), head_dim=4, mask=Mask(causal=True)
        )


@pytest.mark.parametrize("tokens", [-1, 1.5, "8", True])
def test_lengths_are_whole_numbers(tokens):
    with pytest.raises(ShapeError, match=f"{tokens!r} queries and {tokens!r} keys: lengths are"):
        AttentionCase.of(Context(), tokens=tokens, heads=(1, 1), head_dim=4)


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (4, 4), (4, -1)])
def test_a_case_of_other_ranks_is_no_index_error(ranks, rank):
    plan = Context(ring=ranks)
    case = AttentionCase.of(plan, tokens=8, heads=(1, 1), head_dim=4, rank=rank)
    with pytest.raises(PlanMismatch, match=f"rank {rank} of a case of {ranks} ranks, the plan cp4"):
        Context(ring=4).wire(case)


def test_plans_hold_it():
    plan = Plan(kind="train", dp=2, cp=Context(ring=2, ulysses=2))
    assert repr(plan) == "train: fsdp2 cp4(ring2 x ulysses2, auto) = 8 ranks"
    assert plan.sizes["fsdp"] == plan.sizes["ring_out"] == plan.sizes["ulysses"] == 2
    assert Plan(cp=4).cp == Context(ring=4)
    assert Plan(**plan.model_dump()) == plan


@pytest.mark.parametrize("context", named_points(8, 8, 8).values(), ids=Context.short)
def test_plans_with_any_schedule_survive_a_file(context, tmp_path):
    from stretto.plan.io import read_plan, write_plan

    write_plan(Plan(kind="train", cp=context), tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml").cp == context


def test_a_wrong_schedule_in_a_plan_is_named():
    with pytest.raises(PlanMismatch, match=r"cp.schedule: kind 'spiral' is unknown; known are ri"):
        Plan(cp={"ring": 2, "schedule": {"kind": "spiral"}})
    with pytest.raises(PlanMismatch, match=r"cp.schedule.outer: Unexpected keyword argument"):
        Plan(cp={"ring": 2, "schedule": {"kind": "double-ring", "inner": 2, "outer": 1}})


def test_data_counts_ranks_and_bytes():
    data = Data(replicate=2, shard=4)
    assert (data.degree, data.short()) == (8, "replicate2 fsdp4")
    case = DataCase(parameters=10, parameter_bytes=2, gradient_bytes=4, gathers=2)
    expected = Traffic()
    expected.add("weights", "all_gather", "fsdp", 3 * 3 * 2 * 2)
    expected.add("gradients", "reduce_scatter", "fsdp", 3 * 3 * 4)
    expected.add("gradients", "all_reduce", "fsdp", 3 * 4)
    assert data.wire(case) == expected
    assert Data().wire(case) == Traffic()
    with pytest.raises(PlanMismatch, match="shard=0"):
        Data(shard=0)
