"""Tensors cut to the rows of a layout: round trips on virtual ranks, any placement, any dim."""

import pytest
import torch

from stretto import axes
from stretto.errors import PlanMismatch, ShapeError
from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalWorld
from stretto.ops.attention.layout import join, positions, row_positions, shard, take, unshard
from stretto.plan import ranges
from stretto.plan.ranges import Mask, Spans

SIZES = {
    "ring": {"ring_in": 4},
    "all": {"ring_out": 2, "ring_in": 2, "team_out": 1, "team_in": 2, "ulysses": 2},
    "beside others": {"fsdp": 2, "team_in": 2, "ulysses": 3},
    "alone": {},
}
MASKS = {
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=2),
    "documents": Mask(causal=True, documents=(7, 0, 1, 21, 8)),
}


def each_rank(sizes, body):
    """(logical index, result) of `body(mesh)` on every virtual rank."""
    return LocalWorld(sizes).run(lambda mesh: (mesh.rank("cp"), body(mesh)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_is_the_inverse_of_shard(sizes, mask, dim):
    """37 rows: uneven over 4, 6 and 16 ranks, bitwise back on every one."""
    whole, mask = torch.randn(37, 37, 37), MASKS[mask]

    def body(mesh):
        own = shard(whole, dim, mesh, mask=mask)
        return own, unshard(own, dim, mesh, 37, mask=mask)

    expected = ranges.shard("auto", 37, axes.size("cp", axes.ordered(SIZES[sizes])), mask)
    for index, (own, back) in each_rank(SIZES[sizes], body):
        assert own.shape[dim] == expected[index].rows
        assert torch.equal(back, whole)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "documents"])
def test_shards_follow_the_logical_index(layout):
    """Another order of the mesh's axes moves shards to other ranks, and changes none."""
    whole, mask = torch.arange(37), MASKS["documents"]
    plain = axes.ordered(SIZES["all"])
    turned = dict(reversed(plain.items()))
    assert list(turned) != list(plain)

    def body(mesh):
        return shard(whole, 0, mesh, layout=layout, mask=mask)

    first, second = each_rank(plain, body), each_rank(turned, body)
    assert [index for index, _ in first] != [index for index, _ in second]
    by_index = dict(first)
    assert all(torch.equal(own, by_index[index]) for index, own in second)


def test_positions_are_those_of_the_rows():
    whole = torch.arange(37)

    def body(mesh):
        return shard(whole, 0, mesh, layout="zigzag"), positions(37, mesh, layout="zigzag")

    for _, (own, found) in each_rank(SIZES["all"], body):
        assert found.dtype == torch.int64
        assert torch.equal(own, found)


def test_ranks_without_rows():
    """Three rows on sixteen ranks: empty shards come and go like others."""
    whole = torch.randn(2, 3)

    def body(mesh):
        own = shard(whole, 1, mesh, layout="zigzag")
        return own.shape[1], unshard(own, 1, mesh, 3, layout="zigzag")

    found = [result for _, result in each_rank(SIZES["all"], body)]
    assert sorted(rows for rows, _ in found) == [0] * 13 + [1] * 3
    assert all(torch.equal(back, whole) for _, back in found)


def test_no_rows_at_all():
    def body(mesh):
        own = shard(torch.empty(2, 0), 1, mesh)
        return unshard(own, 1, mesh, 0).shape, positions(0, mesh).shape

    assert each_rank(SIZES["ring"], body) == [(n, ((2, 0), (0,))) for n in range(4)]


def test_without_a_mesh_all_rows_are_here():
    whole = torch.randn(5, 2)
    own = shard(whole, 0, None)
    assert torch.equal(own, whole)
    assert torch.equal(unshard(own, 0, None, 5), whole)
    assert positions(5, None).tolist() == [0, 1, 2, 3, 4]


def test_a_shard_is_a_copy():
    """A rank that writes into its rows leaves the whole tensor alone, also where one run is all."""
    whole = torch.zeros(8)
    for layout in ("zigzag", "contiguous"):
        shard(whole, 0, None, layout=layout).fill_(1)
    unshard(whole, 0, None, 8).fill_(1)
    assert not whole.any()


def test_each_rank_sends_its_rows_to_every_other():
    whole = torch.randn(37, 3, dtype=torch.float64)

    def body(mesh):
        counting = CountingMesh(mesh)
        own = shard(whole, 0, counting, layout="zigzag")
        unshard(own, 0, counting, 37, layout="zigzag")
        return own.shape[0], dict(counting.traffic)

    for _, (rows, sent) in each_rank(SIZES["ring"], body):
        assert sent == {("unshard", "exchange", "cp"): 3 * rows * 3 * 8}


def test_shard_and_join_are_differentiable():
    whole = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    shards = ranges.shard("zigzag", 9, 4)
    weights = torch.arange(27.0, dtype=torch.float64).view(3, 9)
    joined = join([take(whole, 1, rows) for rows in shards], 1, shards)
    (joined * weights).sum().backward()
    assert torch.equal(joined, whole)
    assert torch.equal(whole.grad, weights)


def test_rows_in_any_order_of_spans():
    rows = Spans(((6, 8), (1, 3)))
    assert row_positions(rows).tolist() == [1, 2, 6, 7]
    assert take(torch.arange(9), 0, rows).tolist() == [1, 2, 6, 7]
    assert row_positions(Spans()).dtype == torch.int64


def test_rows_past_the_end_are_refused():
    with pytest.raises(ShapeError, match="rows up to 9 asked of a tensor with 9 along dim 0"):
        take(torch.arange(9), 0, Spans(((5, 10),)))


def test_a_shard_of_another_length_is_refused():
    with pytest.raises(ShapeError, match="cut the whole tensor with shard"):
        unshard(torch.zeros(9), 0, None, 10)


def test_one_rank_with_other_rows_ends_all():
    """38 rows instead of 37 give only rank 1 another number; the others do not wait for it."""

    def body(mesh):
        own = shard(torch.zeros(37), 0, mesh, layout="contiguous")
        return unshard(own, 0, mesh, 38, layout="contiguous")

    with pytest.raises(ShapeError, match=r"cp rank 1 holds 9 rows along dim 0, .* gives it 10"):
        each_rank(SIZES["ring"], body)


def test_documents_of_another_length_are_refused():
    with pytest.raises(ShapeError, match="sum to 37"):
        shard(torch.zeros(36), 0, None, mask=MASKS["documents"])


def test_a_layout_for_other_ranks_is_refused():
    with pytest.raises(PlanMismatch, match="lists 2 ranks, the axis has 1"):
        shard(torch.zeros(4), 0, None, layout=(((0, 2),), ((2, 4),)))
