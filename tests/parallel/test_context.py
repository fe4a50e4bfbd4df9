"""The attention module while no plan is bound to it: torch SDPA with stretto's masks."""

import pytest
import torch

from stretto.errors import ShapeError
from stretto.mesh.local import LocalWorld
from stretto.ops.attention.layout import row_positions
from stretto.parallel import context
from stretto.parallel.context import Attention, Binding, own_rows, visible
from stretto.plan.context import Context
from stretto.plan.ranges import Mask, packed


def inputs(tokens=6, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    shape = {"generator": generator, "dtype": torch.float64}
    q = torch.randn(2, heads, tokens, dim, **shape)
    k, v = (torch.randn(2, kv_heads, tokens, dim, **shape) for _ in range(2))
    return q, k, v


def by_hand(q, k, v, seen, scale=None):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_masks_are_those_of_explicit_softmax(causal, window):
    q, k, v = inputs()
    seen = torch.tensor(
        [
            [(not causal or j <= i) and (window is None or abs(i - j) < window) for j in range(6)]
            for i in range(6)
        ]
    )
    assert torch.equal(visible(6, 6, causal, window), seen)
    out = Attention()(q, k, v, causal=causal, window=window, scale=0.3)
    torch.testing.assert_close(out, by_hand(q, k, v, seen, 0.3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 5, 40])
@pytest.mark.parametrize(("queries", "offset"), [(23, 0), (8, 15), (9, 30)])
def test_a_window_is_attended_in_blocks_that_need_no_whole_mask(
    causal, window, queries, offset, monkeypatch
):
    """Values and gradients of explicit softmax; masks no larger than a block and what it sees."""
    monkeypatch.setattr(context, "_BLOCK", 4)
    masks = []

    def counted(*sizes, **options):
        masks.append(sizes[0] * sizes[1])
        return visible(*sizes, **options)

    monkeypatch.setattr(context, "visible", counted)
    q, k, v = (x.requires_grad_() for x in inputs(23))
    own = q[:, :, :queries]
    seen = visible(queries, 23, causal, window, offset)
    out = Attention()(own, k, v, causal=causal, window=window, q_offset=offset)
    some = seen.any(1)  # what a query without keys gets is torch's to say
    wanted = by_hand(own, k, v, seen)
    torch.testing.assert_close(out[:, :, some], wanted[:, :, some], rtol=0, atol=1e-13)
    if some.all():
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        expected = torch.autograd.grad(wanted.square().sum(), (q, k, v))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    rows = max(4, window)
    assert max(masks) <= rows * min(23, rows + 2 * window - 2)


def test_float64_stays_float64_under_autocast_as_in_torch():
    q, k, v = inputs()
    mesh = LocalWorld(Context().sizes).mesh(0)
    bound = Binding(mesh, Context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bound.attend(q, k, v, causal=True)
        lower = bound.attend(q.float(), k.float(), v.float(), causal=True)
    assert (out.dtype, lower.dtype) == (torch.float64, torch.bfloat16)
    torch.testing.assert_close(out, Attention()(q, k, v, causal=True), rtol=0, atol=1e-13)


def test_documents_are_separate_calls_and_may_be_empty():
    q, k, v = inputs()
    out = Attention()(q, k, v, causal=True, documents=(4, 0, 2))
    first = Attention()(q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True)
    second = Attention()(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True)
    assert torch.equal(out, torch.cat([first, second], 2))


def test_queries_at_an_offset_see_the_prefix():
    q, k, v = inputs()
    whole = Attention()(q, k, v, causal=True)
    out = Attention()(q[:, :, 4:], k, v, causal=True, q_offset=4)
    torch.testing.assert_close(out, whole[:, :, 4:], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "documents": [9, 0, 4]},
        {"causal": True, "window": 3},
        {"window": 2, "scale": 0.3},
    ],
)
def test_bound_it_gives_what_it_gives_alone(options):
    q, k, v = inputs(tokens=13)
    right = Attention()(q, k, v, **options)
    plan = Context(ring=2, ulysses=2)
    causal, lengths = options.get("causal", False), options.get("documents")

    def body(mesh):
        module = Attention()
        module.mesh, module.plan = mesh, plan
        mask = Mask(causal=causal, documents=packed(lengths))
        rows = row_positions(own_rows(13, mesh, plan, mask))
        out = module(*(x[:, :, rows] for x in (q, k, v)), **options)
        return out, right[:, :, rows]

    for out, expected in LocalWorld(plan.sizes, timeout_s=20).run(body):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_autocast_is_that_of_sdpa():
    q, k, v = (x.float() for x in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        alone = Attention()(q, k, v.bfloat16())
        module = Attention()
        module.mesh = LocalWorld({}).mesh(0)
        bound = module(q, k, v.bfloat16())
    assert bound.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(bound, alone, rtol=0, atol=0.02)


@pytest.mark.parametrize("bound", [False, True])
def test_a_window_without_keys_is_refused(bound):
    module = Attention()
    module.mesh = LocalWorld({}).mesh(0) if bound else None
    with pytest.raises(ShapeError, match="window=0"):
        module(*inputs(), window=0)


def test_documents_that_do_not_sum_are_refused():
    with pytest.raises(ShapeError, match="7 tokens in all, 6 queries"):
        Attention()(*inputs(), documents=(4, 3))
