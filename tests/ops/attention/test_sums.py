"""Sums of gradients that have not begun: memory that holds anything, set by the first call."""

from __future__ import annotations

import pytest
import torch

from stretto.ops.attention import backends
from stretto.ops.attention.block import Block, copy_
from stretto.plan.ranges import Piece, Spans

CUTS = {
    "one call covers all": [Piece((0, 8), (0, 8), "causal")],
    "halves in one call": [Piece((0, 4), (0, 4), "causal"), Piece((4, 8), (4, 8), "causal")],
    "some queries": [Piece((4, 8), (0, 8), "full")],
    "some keys, then all": [Piece((0, 8), (0, 4), "full"), Piece((4, 8), (0, 8), "full")],
    "nothing": [],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("begun", [(False,) * 3, (True, False, False), (False, True, True)])
def test_sums_that_have_not_begun_are_set(cut, begun):
    generator = torch.Generator().manual_seed(3)
    shape = (8, 2, 3, 4)
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    lse = torch.randn(shape[:3], generator=generator, dtype=torch.float64) + 9
    backend = backends.choose("cpu", q.dtype, 4)
    plain = tuple(torch.zeros(shape, dtype=q.dtype) for _ in range(3))
    start = tuple(
        torch.ones(shape, dtype=q.dtype) if b else torch.full(shape, torch.nan).double()
        for b in begun
    )
    settings = (dout, q, k, v, q, lse, cut, 0.5, backend)
    backends.attend_backward_(plain, *settings)
    backends.attend_backward_(start, *settings, begun=begun)
    for expected, found, b in zip(plain, start, begun, strict=True):
        torch.testing.assert_close(found, expected + 1 if b else expected, rtol=0, atol=1e-14)


def test_rows_of_a_block_go_where_they_belong():
    rows = Spans(((2, 4), (8, 11)))
    tensors = {"k": torch.arange(10.0).view(5, 1, 1, 2), "v": -torch.arange(10.0).view(5, 1, 1, 2)}
    block = Block.of(rows, tensors)
    into = torch.zeros(3, 1, 2, 2)
    block.give(Spans(((3, 4), (8, 10))), "v", into[:, :, 1:])
    assert into[:, 0, 1].tolist() == [[-2, -3], [-4, -5], [-6, -7]]
    assert not into[:, :, 0].any()
    block.take(Spans(((3, 4), (8, 9))), {"k": into[:2, :, 1:]})
    assert block["k"][:, 0, 0].tolist() == [[0, 1], [-2, -3], [-4, -5], [6, 7], [8, 9]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wide elements are a GPU's")
@pytest.mark.parametrize("dim", [1, 4, 6, 128])
@pytest.mark.parametrize("offset", [0, 1])
def test_copies_in_wide_elements_are_exact(dim, offset):
    whole = torch.randn(9, 2, 8, dim, device="cuda").bfloat16()
    source = whole[offset:, :, 3:7]
    into = torch.zeros(8, 2, 8, dim, device="cuda", dtype=torch.bfloat16)[:, :, 4:]
    copy_(into, source[:8])
    assert torch.equal(into, source[:8])
