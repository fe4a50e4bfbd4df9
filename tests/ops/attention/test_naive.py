"""The specification against torch's own attention and its autograd, in float64."""

import pytest
import torch
from torch.nn import functional

from stretto.ops.attention import naive
from stretto.testing.close import assert_close

ROWS, KEYS, SCALE = 7, 9, 0.4


def inputs(heads=4, groups=2, dtype=torch.float64, keys=KEYS):
    generator = torch.Generator().manual_seed(1)

    def draw(h, rows):
        return torch.randn(2, h, rows, 5, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads, ROWS), draw(groups, keys), draw(groups, keys), draw(heads, ROWS)


def some_visible():
    """Every row sees a key, not all see all."""
    visible = torch.rand(ROWS, KEYS, generator=torch.Generator().manual_seed(2)) > 0.5
    visible[:, 3] = True
    return visible


def reference(q, k, v, dout, visible):
    """out and gradients of torch's explicit attention."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=SCALE, enable_gqa=True
    )
    return out.detach(), torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_torch_and_its_autograd(groups, masked):
    q, k, v, dout = inputs(groups=groups)
    visible = some_visible() if masked else None
    expected, gradients = reference(q, k, v, dout, visible)
    out, _ = naive.attention(q, k, v, visible, SCALE)
    assert_close(out, expected, expected)
    for found, wanted in zip(
        naive.attention_backward(dout, q, k, v, visible, SCALE), gradients, strict=True
    ):
        assert_close(found, wanted, wanted)


def test_lse_is_the_natural_logarithm_of_the_sum_of_scores():
    q, k, v, _ = inputs(groups=4)
    visible = some_visible()
    _, lse = naive.attention(q, k, v, visible, SCALE)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    wanted = (scores.exp() * visible).sum(-1).log()
    assert_close(lse, wanted, wanted)


def test_scale_is_one_over_the_root_of_the_head_dim_unless_given():
    q, k, v, dout = inputs()
    given = naive.attention(q, k, v, None, 5**-0.5)
    assert all(map(torch.equal, naive.attention(q, k, v), given))
    given = naive.attention_backward(dout, q, k, v, None, 5**-0.5)
    assert all(map(torch.equal, naive.attention_backward(dout, q, k, v), given))


def test_rows_without_keys_are_zero_and_contribute_nothing():
    q, k, v, dout = inputs()
    visible = some_visible()
    visible[2] = False
    out, lse = naive.attention(q, k, v, visible, SCALE)
    assert (out[:, :, 2] == 0).all()
    assert lse[:, :, 2].isneginf().all()
    dq, dk, dv = naive.attention_backward(dout, q, k, v, visible, SCALE)
    assert (dq[:, :, 2] == 0).all()
    rest = [i for i in range(ROWS) if i != 2]
    without = naive.attention_backward(dout[:, :, rest], q[:, :, rest], k, v, visible[rest], SCALE)
    assert_close(dk, without[1], without[1])
    assert_close(dv, without[2], without[2])


def test_no_keys_at_all():
    q, k, v, dout = inputs(keys=0)
    out, lse = naive.attention(q, k, v, None, SCALE)
    assert (out == 0).all()
    assert lse.isneginf().all()
    dq, dk, _ = naive.attention_backward(dout, q, k, v, None, SCALE)
    assert (dq == 0).all()
    assert dk.shape == k.shape


def test_gradients_of_key_blocks_add_up_under_the_lse_of_all_keys():
    q, k, v, dout = inputs()
    visible = some_visible()
    out, lse = naive.attention(q, k, v, visible, SCALE)
    delta = (dout * out).sum(-1)
    wanted = naive.attention_backward(dout, q, k, v, visible, SCALE)
    parts = [
        naive.attention_backward(
            dout, q, k[:, :, b], v[:, :, b], visible[:, b], SCALE, lse=lse, delta=delta
        )
        for b in (slice(0, 4), slice(4, KEYS))
    ]
    assert_close(parts[0][0] + parts[1][0], wanted[0], wanted[0])
    for index in (1, 2):
        assert_close(torch.cat([part[index] for part in parts], 2), wanted[index], wanted[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_the_dtype_and_statistics_are_float32(dtype):
    q, k, v, dout = inputs(dtype=dtype)
    out, lse = naive.attention(q, k, v, None, SCALE)
    gradients = naive.attention_backward(dout, q, k, v, None, SCALE)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    assert lse.dtype == torch.float32
    exact, _ = naive.attention(q.double(), k.double(), v.double(), None, SCALE)
    # Rounding of probabilities and of the result, not of scores.
    assert 0 < (out - exact).abs().max() < 3 * torch.finfo(dtype).eps * v.abs().max()
