"""Peers side by side: the stand-in they run on, what counts their bytes, and the comparison."""

import sys

import attention_peers
import pytest
import torch
import torch.distributed as dist
from peers import stand_in
from peers.counting import counted
from peers.install import SOURCES, commit_of

from stretto.ops.attention import naive
from stretto.testing.ranks import run_ranks
from tests.benchmarks.conftest import check_format


def tensors(rows=8, heads=4, kv_heads=2, head_dim=16):
    """q, k, v, dout as flash-attn takes them: (batch, rows, heads, head dim)."""
    heads_of = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(1, rows, n, head_dim, dtype=torch.float64) for n in heads_of]


@pytest.mark.parametrize("causal", [True, False])
def test_the_stand_in_for_flash_attn_is_attention(causal):
    q, k, v, dout = tensors()
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    seen = torch.ones(8, 8, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    right, right_lse = naive.attention(*heads, seen)
    out, lse, *_ = stand_in.forward(q, k, v, 0.0, 16**-0.5, causal)
    assert torch.allclose(out.transpose(1, 2), right, atol=1e-12)
    assert torch.allclose(lse.double(), right_lse, atol=1e-12)
    into = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    stand_in.backward(dout, q, k, v, out, lse, *into, 0.0, 16**-0.5, causal)
    grads = naive.attention_backward(dout.transpose(1, 2), *heads, seen)
    for mine, gradient in zip(into, grads, strict=True):
        assert torch.allclose(mine.transpose(1, 2), gradient, atol=1e-12)


@pytest.mark.parametrize(
    "asked", [{"softcap": 1.0}, {"window_size_left": 4}, {"alibi_slopes": torch.ones(4)}]
)
def test_the_stand_in_refuses_what_it_cannot(asked):
    q, k, v, _ = tensors()
    with pytest.raises(NotImplementedError, match="stand-in for flash-attn has no"):
        stand_in.forward(q, k, v, 0.0, 1.0, False, **asked)


def test_peers_find_the_stand_in(monkeypatch):
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    stand_in.provide()
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    assert (_flash_attn_forward, _flash_attn_backward) == (stand_in.forward, stand_in.backward)


def sends(mesh):
    """A ring message in float32 each way, an all-to-all in bfloat16, and what is not allowed."""
    other = 1 - dist.get_rank()
    out, into = torch.ones(10), torch.zeros(10)
    with counted() as sent:
        ops = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        pieces = torch.ones(6, dtype=torch.bfloat16)
        dist.all_to_all_single(torch.empty_like(pieces), pieces)
        with pytest.raises(AssertionError, match=r"torch\.distributed\.all_reduce"):
            dist.all_reduce(out)
    dist.all_reduce(into)
    return dict(sent), float(into.sum())


@pytest.mark.ranks
def test_every_byte_of_a_peer_is_counted_and_nothing_else_passes():
    for sent, total in run_ranks(sends, {"ring_out": 2}):
        assert sent == {("send", "float32"): 40, ("all_to_all", "bfloat16"): 6}
        assert total == 20  # outside, all_reduce is itself again


def row(who, ranks, gradients, error, peer=None):
    return {
        "who": who,
        "peer": peer,
        "ranks": ranks,
        "heads": "8:8",
        "gradients_bytes": gradients,
        "backward_bytes": 2 * gradients,
        "error": {"out": error / 2, "dk": error},
    }


def rows(ours):
    return [
        row(attention_peers.OURS, 4, 1, 1e-3),
        row(attention_peers.OURS_WITHOUT_PRUNING, 4, ours, 2e-3),
        row("ours, ulysses 2 x ring", 4, 10, 2e-3),
        row("ring-flash-attention, zigzag", 4, 100, 4e-3, "ring-flash-attention"),
        row("usp, ulysses 2 x ring zigzag", 4, 40, 4e-3, "yunchang"),
    ]


@pytest.mark.parametrize(("ours", "ok"), [(55, True), (56, False)])
def test_each_peer_is_held_against_ours_of_its_degrees_without_pruning(ours, ok):
    found = attention_peers.summary(rows(ours))
    assert found["gradients_over_peer"] == {
        "ring-flash-attention, zigzag, 4 ranks, 8:8": ours / 100,
        "usp, ulysses 2 x ring zigzag, 4 ranks, 8:8": 0.25,
    }
    assert found["gradients_over_peer_worst"] == ours / 100
    assert found["error_over_peer_worst"] == 0.5
    assert found["ok"] is ok


def test_rows_that_nobody_returned_are_no_result():
    known = {"out": torch.zeros(1, 1, 4, 2, dtype=torch.float64)}
    told = [{"rows": torch.tensor([0, 2]), "results": {"out": torch.ones(1, 1, 2, 2)}}]
    assert attention_peers.whole(told, known)["out"].isnan().sum() == 4


def test_sources_are_pinned_to_commits():
    assert {name: commit_of(source) for name, source in SOURCES.items()} == {
        "ring-flash-attention": "8996282",
        "yunchang": "56118e0",
    }


@pytest.mark.ranks
def test_our_side_on_two_ranks(dry):
    found, printed = dry("attention_peers.py")
    check_format(found)
    by_name = {row["who"]: row for row in found["rows"] if row["heads"] == "4:4"}
    unpruned = by_name[attention_peers.OURS_WITHOUT_PRUNING]
    assert unpruned["gradients_blocks"] == 2  # 2 (P - 1)
    assert unpruned["backward_blocks"] == 4  # 4 (P - 1)
    for name, error in unpruned["error"].items():
        assert error <= 1.5 * by_name["one device"]["error"][name]
    assert "ours, ring unpruned" in printed
