"""Back ends against the specification: every kind of piece, sentinels, strides, the surrogate."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from stretto.errors import ConfigError, ShapeError
from stretto.ops.attention import aten, backends, naive
from stretto.ops.attention.batch import batches
from stretto.ops.attention.merge import accumulators
from stretto.plan.ranges import Mask, Piece, Spans, pieces
from stretto.testing.close import assert_close, distance

SCALE = 0.3
CUDA = pytest.mark.gpu
CASES = [
    ("cpu", "cpu", torch.float64),
    ("cpu", "cpu", torch.float32),
    ("cpu", "cpu", torch.bfloat16),
    ("naive", "cpu", torch.float64),
    pytest.param("flash", "cuda", torch.bfloat16, marks=CUDA),
    pytest.param("cudnn", "cuda", torch.bfloat16, marks=CUDA),
    pytest.param("cudnn", "cuda", torch.float16, marks=CUDA),
    pytest.param("efficient", "cuda", torch.bfloat16, marks=CUDA),
    pytest.param("efficient", "cuda", torch.float32, marks=CUDA),
    pytest.param("naive", "cuda", torch.float64, marks=CUDA),
]


class Case:
    """Seeded tensors in storage order, and the specification's answers on them."""

    def __init__(
        self, rows, keys, dtype, device="cpu", *, batch=2, heads=4, groups=2, dim=8, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(rows, batch, heads, dim)] * 2 + [(keys, batch, groups, dim)] * 2
        draws = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        self.dout, self.q, self.k, self.v = (x.to(device, dtype) for x in draws)

    def exact(self, visible):
        """out, lse, dq, dk, dv in float64, then what plain computations in the dtype give.

        Plain is the specification and torch's own attention, whichever is further off: of a sum
        of a few float32 numbers, one may be nearly exact by chance.
        """
        exact = self._naive(visible, torch.float64)
        plain, own = self._naive(visible, self.q.dtype), self._torch(visible)
        pairs = zip(plain, own, exact, strict=True)
        return exact, [max(p, o, key=lambda x, r=r: distance(x, r)) for p, o, r in pairs]

    def _naive(self, visible, dtype):
        dout, q, k, v = (sdpa(x).to(dtype) for x in (self.dout, self.q, self.k, self.v))
        out, lse = naive.attention(q, k, v, visible, SCALE)
        # From the stored lse and out, as kernels do: what these lost by rounding counts as theirs.
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        given = {"lse": lse, "delta": delta}
        gradients = naive.attention_backward(dout, q, k, v, visible, SCALE, **given)
        return [x.movedim(2, 0) for x in (out, lse, *gradients)]

    def _torch(self, visible):
        lse = self._naive(visible, self.q.dtype)[1]
        if not visible.any(-1).all():
            return self._naive(visible, self.q.dtype)
        dout, q, k, v = (sdpa(x) for x in (self.dout, self.q, self.k, self.v))
        inputs = tuple(x.clone().requires_grad_() for x in (q, k, v))
        out = functional.scaled_dot_product_attention(
            *inputs, attn_mask=visible, scale=SCALE, enable_gqa=True
        )
        found = (out.detach(), *torch.autograd.grad(out, inputs, dout))
        out, *gradients = (x.movedim(2, 0) for x in found)
        return [out, lse, *gradients]


def sdpa(x_LBHD):
    return x_LBHD.movedim(0, 2)


def seen(kind, rows, keys, device="cpu"):
    everything = torch.ones(rows, keys, dtype=torch.bool, device=device)
    return {"full": everything, "causal": everything.tril(), "anticausal": everything.triu()}[kind]


def everything(case, kind, backend):
    """out, lse, dq, dk, dv of one piece, the gradients through the surrogate."""
    q, k, v, dout = case.q, case.k, case.v, case.dout
    out, lse = backends.forward(q, k, v, kind, SCALE, backend)
    stand_in = backends.surrogate(dout, backends.delta(dout, out), like=out)
    gradients = backends.backward(dout, q, k, v, stand_in, lse, kind, SCALE, backend)
    return [out, lse, *gradients]


def check(found, exact, base):
    """Compare out, lse, dq, dk, dv.

    In half precision the bound of lse is that of out, of which it is a relative error. Gradients
    get the plain error once more for the rounding of the surrogate; in float32, where the plain
    error of so few numbers is a draw itself, eight times (of 40 seeds the worst was 6.2).
    """
    whole = found[0].dtype == torch.float32
    for name, x, b, r in zip(("out", "lse", "dq", "dk", "dv"), found, base, exact, strict=True):
        if name == "lse" and found[0].dtype in (torch.bfloat16, torch.float16):
            assert distance(x, r) <= torch.finfo(found[0].dtype).eps
        elif name == "lse" and x.is_cuda and x.dtype == torch.float32:
            # Kernels keep it to base 2, which costs a few roundings more than the logarithm.
            peak = max(1.0, r[r.isfinite()].abs().max().item())
            assert distance(x, r) <= 8 * torch.finfo(x.dtype).eps * peak
        else:
            factor = 2 if not name.startswith("d") else 8 if whole else 3
            assert_close(x, b, r, what=name, factor=factor)


@pytest.mark.parametrize("kind", ["full", "causal", "anticausal"])
@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 8), (4, 2, 16), (3, 1, 5)])
def test_every_kind_against_the_specification(name, device, dtype, kind, heads, groups, dim):
    rows = 37
    keys = 21 if kind == "full" else rows
    case = Case(rows, keys, dtype, device, heads=heads, groups=groups, dim=dim)
    backend = backends.choose(device, dtype, dim, name)
    exact, base = case.exact(seen(kind, rows, keys, device))
    found = everything(case, kind, backend)
    check(found, exact, base)
    out, lse, *gradients = found
    assert all(x.is_contiguous() for x in (out, *gradients))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[0].dtype == dtype


@pytest.mark.parametrize("kind", ["full", "causal", "anticausal"])
@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_are_not_positive(name, device, dtype, kind, scale, monkeypatch):
    """torch's kernels multiply -inf by the scale: NaN, or hidden keys that hide all others."""
    monkeypatch.setattr(f"{__name__}.SCALE", scale)
    case = Case(21, 21, dtype, device)
    exact, base = case.exact(seen(kind, 21, 21, device))
    check(everything(case, kind, backends.choose(device, dtype, 8, name)), exact, base)


@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_single_rows_and_keys(name, device, dtype, shape):
    case = Case(*shape, dtype, device)
    exact, base = case.exact(seen("full", *shape, device))
    out, lse, dq, dk, dv = everything(case, "full", backends.choose(device, dtype, 8, name))
    if shape[1] == 1:
        # One key has weight 1 whatever q and k are: dq, dk are roundings of differences that are 0.
        terms = case.dout.double().norm(dim=-1).max() * case.v.double().norm(dim=-1).max()
        bound = torch.finfo(dtype).eps * terms * SCALE
        assert dq.abs().max() <= bound * case.k.abs().max()
        assert dk.abs().max() <= bound * case.q.double().norm(dim=0).max() * 2
        dq, dk = (x.to(dtype) for x in exact[2:4])
    check([out, lse, dq, dk, dv], exact, base)


@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
@pytest.mark.parametrize("strict", [False, True])
def test_anticausal_is_the_causal_square_of_reversed_rows(name, device, dtype, strict):
    """Strictly anticausal on n rows is the inclusive square of rows 0..n-2 and keys 1..n-1."""
    rows = 20
    case = Case(rows, rows, dtype, device)
    visible = seen("anticausal", rows, rows, device)
    if strict:
        visible = visible.triu(1)
    span = rows - strict
    piece = Piece((0, span), (rows - span, rows), "anticausal")
    backend = backends.choose(device, dtype, 8, name)
    out, lse = backends.attend(case.q, case.k, case.v, [piece], SCALE, backend)
    exact, base = case.exact(visible)
    found = step_by_step(case, [piece], backend)
    check([out, lse, *found[2:]], exact, base)
    check(found, exact, base)


def step_by_step(case, cut, backend):
    """out, lse and gradients of `cut`, merged and summed as a ring does."""
    acc, lse = accumulators(case.q)
    tensors = case.q, case.k, case.v
    backends.attend_(acc, lse, *tensors, cut, SCALE, backend)
    out = acc.to(case.q.dtype)
    stand_in = backends.surrogate(case.dout, backends.delta(case.dout, out), like=out)
    sums = tuple(torch.zeros_like(x, dtype=lse.dtype) for x in tensors)
    backends.attend_backward_(sums, case.dout, *tensors, stand_in, lse, cut, SCALE, backend)
    return [out, lse, *(x.to(case.q.dtype) for x in sums)]


class Recorder:
    """A back end that counts calls and the pieces in each."""

    def __init__(self, name="cpu"):
        real = backends.BACKENDS[name]
        self.counts = []

        def forward(q, *rest):
            self.counts.append(q.shape[0])
            return real.forward(q, *rest)

        def backward(dout, *rest):
            self.counts.append(dout.shape[0])
            return real.backward(dout, *rest)

        self.backend = dataclasses.replace(real, forward=forward, backward=backward)


@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
def test_equal_pieces_with_rows_between_them_are_one_call(name, device, dtype):
    cut = [
        Piece((2, 6), (1, 5), "causal"),
        Piece((9, 13), (8, 12), "causal"),
        Piece((16, 20), (15, 19), "causal"),
    ]
    assert len(batches(cut)) == 1
    case = Case(21, 20, dtype, device)
    visible = torch.zeros(21, 20, dtype=torch.bool, device=device)
    for (a, b), (c, d), _ in cut:
        visible[a:b, c:d] = seen("causal", b - a, d - c, device)
    exact, base = case.exact(visible)
    check(step_by_step(case, cut, backends.choose(device, dtype, 8, name)), exact, base)


def test_calls_counted():
    case, recorder = Case(12, 12, torch.float64), Recorder()
    squares = [Piece((0, 6), (0, 6), "causal"), Piece((6, 12), (6, 12), "causal")]
    cut = [*squares, Piece((6, 12), (0, 6), "full")]
    exact, base = case.exact(seen("causal", 12, 12))
    check(step_by_step(case, cut, recorder.backend), exact, base)
    assert recorder.counts == [2, 1, 2, 1]


def test_pieces_that_share_rows_or_cross_or_have_uneven_gaps_are_separate_calls():
    shared_q = [Piece((0, 4), (0, 4), "full"), Piece((0, 4), (4, 8), "full")]
    shared_k = [Piece((0, 4), (0, 4), "full"), Piece((4, 8), (0, 4), "full")]
    crossed = [Piece((0, 4), (4, 8), "full"), Piece((4, 8), (0, 4), "full")]
    for cut in (shared_q, shared_k, crossed):
        assert [batch.count for batch in batches(cut)] == [1, 1]
    uneven = [Piece((i, i + 2), (i, i + 2), "causal") for i in (0, 2, 6, 10)]
    assert [batch.count for batch in batches(uneven)] == [2, 2]


@given(
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9),
    cuts=st.lists(st.integers(0, 24), min_size=2, max_size=6),
    documents=st.none() | st.integers(1, 23),
    seed=st.integers(0, 9),
)
def test_pieces_of_any_mask_merge_to_the_specification(causal, window, cuts, documents, seed):
    lengths = None if documents is None else (documents, 24 - documents)
    mask = Mask(causal=causal, window=window, documents=lengths)
    cuts = sorted(cuts)
    q_spans = Spans(tuple(zip(cuts[::2], cuts[1::2], strict=False)))
    q_rows = [i for a, b in q_spans for i in range(a, b)]
    table = [sees(mask, i, j) for i in q_rows for j in range(24)]
    visible = torch.tensor(table, dtype=torch.bool).view(len(q_rows), 24)
    case = Case(len(q_rows), 24, torch.float64, seed=seed, batch=1, heads=2, groups=1, dim=4)
    cut = pieces(mask, q_spans, Spans(((0, 24),)))
    exact, base = case.exact(visible)
    check(step_by_step(case, cut, backends.choose("cpu", torch.float64, 4)), exact, base)


def sees(mask, i, j):
    """The definition of a mask, one pair at a time."""
    gap = i - j if mask.causal else abs(i - j)
    far = mask.window is not None and gap >= mask.window
    first = mask.documents[0] if mask.documents else 0
    return not far and (not mask.causal or j <= i) and (i < first) == (j < first)


def test_empty_rows_and_keys_never_reach_a_kernel():
    """ATen's CPU kernel ends the process on empty keys; this back end raises instead."""

    def refuse(*_):
        raise AssertionError("an empty input reached the kernel")

    backend = dataclasses.replace(backends.BACKENDS["cpu"], forward=refuse, backward=refuse)
    for rows, keys in ((0, 5), (5, 0), (0, 0)):
        case = Case(rows, keys, torch.float32)
        out, lse, dq, dk, dv = everything(case, "full", backend)
        assert out.shape == case.q.shape
        assert dk.shape == case.k.shape
        assert lse.dtype == torch.float32
        assert lse.isneginf().all()
        assert all((x == 0).all() for x in (out, dq, dk, dv))
        empty = [Piece((0, rows), (0, keys), "full")]
        found, found_lse = backends.attend(case.q, case.k, case.v, [], SCALE, backend)
        assert (found == 0).all()
        assert found_lse.isneginf().all()
        assert all((x == 0).all() for x in step_by_step(case, empty, backend)[2:])
    with pytest.raises(AssertionError, match="reached the kernel"):
        everything(Case(5, 5, torch.float32), "full", backend)


def test_squares_must_be_square_and_storage_contiguous():
    cpu = backends.BACKENDS["cpu"]
    case = Case(6, 5, torch.float32)
    with pytest.raises(AssertionError, match="a causal piece is square"):
        backends.forward(case.q, case.k, case.v, "causal", SCALE, cpu)
    with pytest.raises(AssertionError, match="rows outermost"):
        backends.forward(case.q.transpose(0, 1), case.k, case.v, "full", SCALE, cpu)


def test_pieces_beyond_the_rows_are_refused_although_memory_goes_on():
    case = Case(12, 12, torch.float32)
    first = case.q[:6], case.k[:6], case.v[:6]
    for piece in (Piece((2, 8), (0, 4), "full"), Piece((0, 4), (4, 8), "full")):
        with pytest.raises(AssertionError, match="of 6 rows"):
            backends.attend(*first, [piece], SCALE, backends.BACKENDS["cpu"])


def test_cudnn_refuses_an_out_laid_out_otherwise_than_its_forward_does():
    """It would return wrong gradients; the assertion comes before the kernel, so CPU shows it."""
    x = torch.zeros(1, 6, 2, 8).transpose(1, 2)
    with pytest.raises(AssertionError, match=r"\(96, 48, 8, 1\), \(96, 8, 16, 1\)"):
        aten.cudnn_backward(x, x, x, x, x.contiguous(), x[..., 0], False, SCALE)


def test_tensors_that_require_gradients_build_no_graph():
    case = Case(4, 4, torch.float64)
    case.q.requires_grad_()
    assert not any(x.requires_grad for x in everything(case, "full", backends.BACKENDS["cpu"]))


def test_auto_takes_the_first_back_end_that_fits():
    assert backends.choose("cpu", torch.float64, 64).name == "cpu"
    assert backends.choose("cpu", torch.bfloat16, 7).name == "cpu"
    assert backends.choose("cpu", torch.float32, 64, "naive").name == "naive"


def choice(monkeypatch, dtype, head_dim, capability):
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    return backends.choose("cuda", dtype, head_dim).name


def test_auto_on_cuda(monkeypatch):
    half = torch.bfloat16
    assert choice(monkeypatch, half, 128, (9, 0)) == "cudnn"
    assert choice(monkeypatch, half, 192, (9, 0)) == "flash"
    assert choice(monkeypatch, half, 128, (8, 0)) == "flash"
    assert choice(monkeypatch, half, 320, (9, 0)) == "efficient"
    assert choice(monkeypatch, torch.float32, 64, (9, 0)) == "efficient"
    assert choice(monkeypatch, torch.float64, 64, (9, 0)) == "naive"
    torch.use_deterministic_algorithms(True)
    try:
        assert choice(monkeypatch, half, 128, (9, 0)) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_back_end_that_does_not_fit_is_an_error_with_both_sides():
    with pytest.raises(
        ShapeError, match="flash does not take float64 with head dim 64 on cpu"
    ) as e:
        backends.choose("cpu", torch.float64, 64, "flash")
    assert "it takes cuda, bfloat16, float16, head dim <= 256" in str(e.value)
    assert "auto or one of: cpu, naive" in str(e.value)
    with pytest.raises(ConfigError, match="'quick'; there are auto, cpu, cudnn, flash"):
        backends.choose("cpu", torch.float64, 64, "quick")


# The surrogate


def surrogate_of(dout, out):
    delta = backends.delta(dout, out)
    return delta, backends.surrogate(dout, delta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4])
def test_surrogate_keeps_delta_and_is_no_longer_than_out(dtype, scale):
    case = Case(50, 1, torch.float64, dim=64)
    dout, out = (scale * case.dout).to(dtype), case.q.to(dtype)
    delta, stand_in = surrogate_of(dout, out)
    assert stand_in.dtype == dtype
    assert stand_in.isfinite().all()
    eps = torch.finfo(dtype).eps
    longest = out.double().norm(dim=-1)
    assert (stand_in.double().norm(dim=-1) <= longest * (1 + 4 * eps)).all()
    # Rounding the surrogate moves its product with dout by at most eps of both lengths.
    moved = (stand_in.double() * dout.double()).sum(-1) - (out.double() * dout.double()).sum(-1)
    bound = 4 * eps * longest * dout.double().norm(dim=-1)
    wide = torch.finfo(delta.dtype).eps * 64
    assert (moved.abs() <= bound + wide * longest * dout.double().norm(dim=-1)).all()


def test_surrogate_of_zero_gradients_is_zero():
    case = Case(6, 1, torch.float32)
    case.dout[2] = 0
    _, stand_in = surrogate_of(case.dout, case.q)
    assert (stand_in[2] == 0).all()
    assert (stand_in[3] != 0).any()


def test_surrogate_is_laid_out_as_asked():
    case = Case(6, 1, torch.float32)
    like = torch.empty(4, 2, 6, 8).permute(2, 1, 0, 3)
    delta = backends.delta(case.dout, case.q)
    found = backends.surrogate(case.dout, delta, like=like)
    assert found.stride() == like.stride()
    assert torch.equal(found, backends.surrogate(case.dout, delta))
    assert backends.surrogate(case.dout[:0], delta[:0]).shape == (0, 2, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_gradients_through_the_surrogate_are_as_good_as_through_out(dtype, scale):
    case = Case(33, 33, dtype, dim=16)
    case.dout.mul_(scale)
    case.dout[5] = 0
    exact, base = case.exact(seen("causal", 33, 33))
    found = everything(case, "causal", backends.BACKENDS["cpu"])
    for x, b, r in zip(found[2:], base[2:], exact[2:], strict=True):
        # float64 has an absolute floor at entries of size 1: bring the gradients there.
        unit = r.abs().max() if dtype == torch.float64 else 1
        assert_close(x / unit, b / unit, r / unit)


def test_a_wrong_surrogate_would_be_noticed():
    case = Case(33, 33, torch.float64)
    cpu = backends.BACKENDS["cpu"]
    exact, base = case.exact(seen("causal", 33, 33))
    out, lse = backends.forward(case.q, case.k, case.v, "causal", SCALE, cpu)
    wrong = torch.zeros_like(out)
    dq, *_ = backends.backward(case.dout, case.q, case.k, case.v, wrong, lse, "causal", SCALE, cpu)
    with pytest.raises(AssertionError, match="float64 allows"):
        assert_close(dq, base[2], exact[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_delta_and_surrogate_equal_torch(dtype):
    case = Case(50, 1, dtype, dim=40)
    delta, stand_in = surrogate_of(case.dout, case.q)
    on_cuda = surrogate_of(case.dout.cuda(), case.q.cuda())
    assert_close(on_cuda[0].cpu(), delta, delta.double())
    assert_close(on_cuda[1].cpu(), stand_in, stand_in.double())
