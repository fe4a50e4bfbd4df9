"""Attention sinks over ranks against a softmax with one more column, in float64."""

from dataclasses import replace

import pytest
import torch

from stretto.errors import ShapeError
from stretto.mesh.local import LocalWorld
from stretto.ops.attention.dist import attention
from stretto.ops.attention.layout import shard
from stretto.plan.context import Context, Gather, Ring, StarTrail
from stretto.plan.ranges import Mask

BATCH, HEADS, GROUPS, TOKENS, DIM = 2, 4, 2, 18, 8


def inputs():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, dout = draw(BATCH, HEADS, TOKENS, DIM), draw(BATCH, HEADS, TOKENS, DIM)
    k, v = draw(BATCH, GROUPS, TOKENS, DIM), draw(BATCH, GROUPS, TOKENS, DIM)
    return q, k, v, draw(HEADS) * 2, dout


def by_hand(q, k, v, sinks, window=None):
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    behind = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    hidden = (behind < 0) | (behind >= (window or TOKENS))
    scores = (q @ k.mT * DIM**-0.5).masked_fill(hidden, -torch.inf)
    sink = sinks[None, :, None, None].expand(BATCH, -1, TOKENS, 1)
    return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1] @ v


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "plan",
    [
        Context(),
        Context(ring=3),
        Context(ring=2, schedule=Ring(circulate="q")),
        Context(ring=2, schedule=Gather()),
        Context(ulysses=4),
        Context(ulysses=2, team=2),
        Context(team=2, ring=2, schedule=StarTrail()),
    ],
    ids=Context.short,
)
def test_outputs_and_every_gradient(plan, window):
    plan = replace(plan, layout="zigzag")
    *leaves, dout = inputs()
    right = [leaf.clone().requires_grad_() for leaf in leaves]
    whole = by_hand(*right, window)
    whole.backward(dout)
    mask = Mask(causal=True, window=window)

    def rank(mesh):
        def own(x):
            return shard(x, 2, mesh, layout="zigzag", mask=mask)

        q, k, v = (own(leaf).clone().requires_grad_() for leaf in leaves[:3])
        sinks = leaves[3].clone().requires_grad_()
        out = attention(q, k, v, mesh=mesh, plan=plan, causal=True, window=window, sinks=sinks)
        out.backward(own(dout))
        torch.testing.assert_close(out, own(whole), rtol=0, atol=1e-13)
        for found, leaf in zip((q, k, v), right, strict=False):
            torch.testing.assert_close(found.grad, own(leaf.grad), rtol=0, atol=1e-12)
        return sinks.grad

    parts = LocalWorld(plan.sizes).run(rank)
    torch.testing.assert_close(sum(parts), right[3].grad, rtol=0, atol=1e-12)


def test_only_the_sinks_may_be_learned():
    q, k, v, sinks, dout = inputs()
    sinks.requires_grad_()
    attention(q, k, v, causal=True, sinks=sinks).backward(dout)
    right = sinks.detach().clone().requires_grad_()
    by_hand(q, k, v, right).backward(dout)
    torch.testing.assert_close(sinks.grad, right.grad, rtol=0, atol=1e-12)


def test_a_query_without_keys_gives_all_to_the_sink():
    q, k, v, sinks, _ = inputs()
    out, lse = attention(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sinks[None, :, None].expand_as(lse))


def test_one_sink_per_head():
    q, k, v, sinks, _ = inputs()
    with pytest.raises(ShapeError, match=r"sinks have shape \(3,\).*\(4,\)"):
        attention(q, k, v, sinks=sinks[:3])
