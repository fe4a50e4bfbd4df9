"""Placement: the order of axes decides who are neighbours, and nothing else."""

import pytest
import torch

from stretto import axes
from stretto.errors import PlanMismatch
from stretto.mesh.local import LocalWorld
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.io import read_plan, write_plan
from stretto.plan.model import Placement, Plan
from stretto.plan.options import AttentionCase, Context, StarTrail
from stretto.plan.ranges import Mask


def placed(*order, **fields):
    return Plan(kind="train", placement=Placement(order=order), **fields)


def test_named_axes_come_last_in_their_order():
    plan = placed("ulysses", "ring_out", dp=2, cp=Context(ulysses=2, ring=4))
    assert list(plan.sizes)[-2:] == ["ulysses", "ring_out"]
    assert set(plan.sizes) == set(axes.ORDER)
    assert axes.ordered(plan.sizes) == plan.sizes
    assert list(axes.ordered(plan.sizes)) == list(plan.sizes)
    # Ranks side by side are neighbours on the ring, four of them before the heads change.
    assert axes.peers(0, "ring", plan.sizes) == [0, 1, 2, 3]
    assert axes.peers(0, "ulysses", plan.sizes) == [0, 4]
    assert "order ulysses ring_out" in str(plan)


def test_round_trip(tmp_path):
    plan = placed("ulysses", "ring_out", cp=Context(ulysses=2, ring=2))
    write_plan(plan, tmp_path / "p.yaml")
    assert read_plan(tmp_path / "p.yaml") == plan
    assert list(read_plan(tmp_path / "p.yaml").sizes) == list(plan.sizes)


@pytest.mark.parametrize("order", [("ring",), ("ulysses", "ulysses"), ("rows",)])
def test_orders_of_known_axes_only(order):
    with pytest.raises(PlanMismatch, match=r"placement.order: order .*at most once"):
        Plan(kind="train", placement={"order": order})


def results(plan):
    """By logical index: output and gradients of a small call."""
    context, mask = plan.cp, Mask(causal=True)
    case = AttentionCase.of(
        context, tokens=8 * context.degree, heads=(4, 2), head_dim=4, item_bytes=8, mask=mask
    )

    def body(mesh):
        rank = mesh.rank("cp")
        generator = torch.Generator().manual_seed(rank)
        shapes = ((1, 4, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4), (1, 4, 8, 4))
        q, k, v, dout = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )
        out, _, saved = forward_rank(q, k, v, mesh=mesh, context=context, case=case.at(rank))
        return rank, (out, *backward_rank(dout, saved))

    return dict(LocalWorld(plan.sizes).run(body))


@pytest.mark.parametrize(
    ("context", "order"),
    [
        (Context(ulysses=2, ring=4), ("ulysses", "ring_out")),
        (Context(ulysses=2, team=2, ring=2), ("team_out", "ulysses", "ring_out")),
        (Context(team=2, ring=4, schedule=StarTrail()), ("team_out", "ring_out")),
    ],
)
def test_an_order_changes_no_bit(context, order):
    here = results(Plan(kind="train", cp=context))
    there = results(placed(*order, cp=context))
    for rank, tensors in here.items():
        for mine, theirs in zip(tensors, there[rank], strict=True):
            assert torch.equal(mine, theirs)
