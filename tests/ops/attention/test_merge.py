"""Merging partials: exact, order-free, deaf to what an absent side holds; Triton likewise."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from stretto.ops.attention import naive
from stretto.ops.attention.merge import accumulators, merge_
from stretto.testing.close import assert_close
from tests.conftest import poison

ROWS, BATCH, HEADS, DIM = 6, 2, 3, 8
INF = float("inf")


def storage(x_BHLD):
    return x_BHLD.movedim(2, 0).contiguous()


def inputs(keys, dtype=torch.float64, heads=HEADS):
    generator = torch.Generator().manual_seed(3)
    shapes = ((BATCH, heads, rows, DIM) for rows in (ROWS, keys, keys))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def merged(q, k, v, blocks):
    """out and lse of q over blocks of keys, in storage order."""
    acc, acc_lse = accumulators(storage(q))
    for block in blocks:
        out, lse = naive.attention(q, k[:, :, block], v[:, :, block])
        merge_(acc, acc_lse, storage(out), storage(lse[..., None])[..., 0])
    return acc, acc_lse


@pytest.mark.parametrize("cuts", [(0, 12), (0, 1, 12), (0, 3, 3, 5, 12)])
def test_merged_blocks_are_the_whole(cuts):
    q, k, v = inputs(12)
    blocks = [slice(*cut) for cut in itertools.pairwise(cuts)]
    out, lse = naive.attention(q, k, v)
    for order in (blocks, blocks[::-1]):
        acc, acc_lse = merged(q, k, v, order)
        assert_close(acc, storage(out), storage(out))
        assert_close(acc_lse, lse.movedim(2, 0), lse.movedim(2, 0))


def test_both_absent_stays_absent():
    acc, acc_lse = accumulators(torch.ones(ROWS, BATCH, HEADS, DIM))
    merge_(acc, acc_lse, torch.full_like(acc, torch.nan), torch.full_like(acc_lse, -INF))
    assert (acc == 0).all()
    assert acc_lse.isneginf().all()


def test_an_absent_side_may_hold_anything():
    q, k, v = inputs(5)
    out, lse = (storage(x) for x in naive.attention(q, k, v))
    acc, acc_lse = accumulators(out)
    poison(acc)
    merge_(acc, acc_lse, out, lse)
    assert torch.equal(acc, out)
    assert torch.equal(acc_lse, lse)
    merge_(acc, acc_lse, torch.full_like(out, torch.nan), torch.full_like(lse, -INF))
    assert torch.equal(acc, out)


def test_large_scores_do_not_overflow():
    """Log-sum-exps of 1e4 apart: the larger side wins, no infinity appears."""
    acc, acc_lse = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), -1e4)
    merge_(acc, acc_lse, torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1), 1e4))
    assert (acc == 5).all()
    assert acc_lse.item() == 1e4


def test_views_of_rows_change_those_rows_alone():
    q, k, v = inputs(5)
    out, lse = (storage(x) for x in naive.attention(q, k, v))
    acc, acc_lse = accumulators(out)
    merge_(acc[2:4], acc_lse[2:4], out[2:4], lse[2:4])
    assert torch.equal(acc[2:4], out[2:4])
    assert (acc[:2] == 0).all()
    assert acc_lse[4:].isneginf().all()


def test_no_rows():
    acc, acc_lse = accumulators(torch.ones(0, BATCH, HEADS, DIM))
    merge_(acc, acc_lse, torch.ones(0, BATCH, HEADS, DIM), torch.ones(0, BATCH, HEADS))


@pytest.mark.parametrize("count", [1, 2, 4, 16, 64])
def test_error_does_not_grow_with_the_number_of_bfloat16_partials(count):
    q, k, v = inputs(256, torch.bfloat16, heads=16)
    exact = storage(naive.attention(q.double(), k.double(), v.double())[0])
    base = storage(naive.attention(q, k, v)[0])
    blocks = [slice(i, i + 256 // count) for i in range(0, 256, 256 // count)]
    acc, _ = merged(q, k, v, blocks)
    assert acc.dtype == torch.float32
    assert_close(acc.to(torch.bfloat16), base, exact)


def test_error_would_grow_in_bfloat16_accumulators():
    q, k, v = inputs(256, torch.bfloat16, heads=16)
    exact = storage(naive.attention(q.double(), k.double(), v.double())[0])
    acc, acc_lse = accumulators(storage(q))
    for i in range(0, 256, 4):
        out, lse = naive.attention(q, k[:, :, i : i + 4], v[:, :, i : i + 4])
        merge_(acc, acc_lse, storage(out), storage(lse[..., None])[..., 0])
        acc = acc.to(torch.bfloat16).float()
    base = storage(naive.attention(q, k, v)[0])
    with pytest.raises(AssertionError, match="bfloat16 allows"):
        assert_close(acc.to(torch.bfloat16), base, exact)


INTERPRETED = """
import torch
from stretto.ops.attention import backends, merge, triton
torch.manual_seed(0)
inf = float("inf")
for width in (1, 40, 128):
    for rows in (1, 7, 130):
        shape = (rows, 1, 3)
        for dtype in (torch.float32, torch.bfloat16):
            acc, part = torch.randn(*shape, width), torch.randn(*shape, width).to(dtype)
            acc_lse, part_lse = 5 * torch.randn(shape), 5 * torch.randn(shape)
            acc_lse[:, :, 1], part_lse[:, :, 2] = -inf, -inf
            acc[:, :, 1], part[:, :, 2] = torch.nan, torch.nan
            part_lse[0] = acc_lse[0] = -inf
            wanted, wanted_lse = acc.clone(), acc_lse.clone()
            merge._merge(wanted, wanted_lse, part, part_lse)
            triton.merge_(acc, acc_lse, part, part_lse)
            torch.testing.assert_close(acc, wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(acc_lse, wanted_lse, rtol=1e-6, atol=1e-6)
            dout = torch.randn(*shape, width)
            dout[:, :, 0], dout[:, :, 1], dout[:, :, 2] = 0, 1e-30, 1e4 * dout[:, :, 2]
            dout, out = dout.to(dtype), torch.randn(*shape, width).to(dtype)
            wanted = backends.delta(dout, out)
            found = torch.full(shape, torch.nan)
            triton.delta(dout, out, found)
            scale = dout.float().abs().amax(-1).clamp_min(1e-30)
            torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-6, atol=2e-6)
            found = torch.full_like(dout, torch.nan)
            triton.surrogate(dout, wanted, found)
            torch.testing.assert_close(found, backends.surrogate(dout, wanted))
print("equal")
"""


def test_triton_kernels_equal_torch_in_the_interpreter():
    """Ragged rows, head dims that are no powers of two, absent and NaN sides, bfloat16."""
    pytest.importorskip("triton")
    # The interpreter is chosen where triton is imported, so it needs a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "equal\n"
