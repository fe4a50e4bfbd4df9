"""One piece on one rank: torch's own kernel on the caller's tensors, and nothing else."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from stretto.ops.attention import backends, dist, single
from stretto.ops.attention.job import Job
from stretto.ops.attention.naive import attention as naive
from stretto.plan.context import AttentionCase, Context
from stretto.plan.ranges import Mask
from stretto.plan.schedule import schedule
from stretto.testing.close import assert_close

#: What makes a view or memory runs no kernel. `fill_` is the poison that tests put into memory.
QUIET = {
    *("alias", "as_strided", "detach", "permute", "select", "slice", "squeeze", "transpose"),
    *("unsqueeze", "view", "empty_like", "new_empty", "fill_"),
}
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
CUDA = {name: f"_scaled_dot_product_{name}_attention" for name in ("cudnn", "flash", "efficient")}


class Kernels(TorchDispatchMode):
    """Names of all operators that compute or copy."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name not in QUIET:
            self.names.append(name)
        return op(*args, **(kwargs or {}))


def draws(batch=2, heads=4, groups=2, rows=48, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, dim)] * 2 + [(batch, groups, rows, dim)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def rows_outermost(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def rows_before_heads(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "rows before heads": rows_before_heads,
    "rows outermost": rows_outermost,
    "a share of heads": lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_kernel_each_way_and_the_bits_of_torch(layout, groups, causal):
    dout, *inputs = (LAYOUTS[layout](x) for x in draws(groups=groups))
    inputs = [x.requires_grad_() for x in inputs]
    own = functional.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
    wanted = (own, *gradients(own, inputs, dout))
    with Kernels() as forward:
        out = dist.attention(*inputs, causal=causal)
    with Kernels() as backward:
        found = (out, *gradients(out, inputs, dout))
    assert forward.names == [FORWARD]
    assert backward.names == [f"{FORWARD}_backward"]
    assert all(map(torch.equal, found, wanted))
    assert [x.stride() for x in found] == [x.stride() for x in wanted]


def test_the_count_sees_a_copy():
    _, q, k, v = draws()
    with Kernels() as kernels:
        dist.attention(q, k, v, window=5, causal=True)
    assert kernels.names.count(FORWARD) > 1
    assert "copy_" in kernels.names


def job_of(name, q, k, causal):
    case = AttentionCase.of(
        Context(),
        tokens=q.shape[2],
        heads=(q.shape[1], k.shape[1]),
        head_dim=q.shape[3],
        batch=q.shape[0],
        item_bytes=q.element_size(),
        mask=Mask(causal=causal),
    )
    plan = schedule(Context(), case)
    return Job(plan, None, backends.BACKENDS[name], 0.25, q.dtype, q.device)


def on_meta(groups):
    return [x.to("meta") for x in draws(groups=groups, rows=64, dtype=torch.bfloat16)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CUDA)
def test_kernels_of_gpus_run_alone(name, causal):
    """On shapes only, as the operators of GPUs can be called without one."""
    groups = 4 if name == "efficient" else 2  # its keys are repeated for every head
    dout, q, k, v = on_meta(groups)
    job = job_of(name, q, k, causal)
    assert single.is_single(job.schedule)
    assert single.takes(job.backend, q, k, v)
    with Kernels() as forward:
        saved = single.forward(job, q, k, v)
    with Kernels() as backward:
        single.backward(dout, saved)
    assert forward.names == [CUDA[name]]
    assert backward.names == [f"{CUDA[name]}_backward"]


@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("name", CUDA)
def test_kernels_of_gpus_run_alone_on_storage(name, kind):
    groups = 4 if name == "efficient" else 2
    dout, q, k, v = (x.permute(2, 0, 1, 3).contiguous() for x in on_meta(groups))
    backend = backends.BACKENDS[name]
    with Kernels() as forward:
        out, lse = backends.forward(q, k, v, kind, 0.25, backend)
    with Kernels() as backward:
        found = backends.backward(dout, q, k, v, out, lse, kind, 0.25, backend)
    assert forward.names == [CUDA[name]]
    assert backward.names == [f"{CUDA[name]}_backward"]
    assert all(x.is_contiguous() for x in (out, *found))


def test_backward_keeps_the_callers_own_tensors():
    _, *inputs = draws()
    inputs = [x.requires_grad_() for x in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = dist.attention(*inputs, causal=True)
    places = [x.untyped_storage().data_ptr() for x in kept]
    assert places[:4] == [x.untyped_storage().data_ptr() for x in (*inputs, out)]
    assert len(kept) == 5


def test_an_input_that_changed_before_backward_is_noticed():
    _, q, k, v = draws()
    out = dist.attention(q.clone().requires_grad_(), k, v)
    changed = k.clone()
    other = dist.attention(q.clone().requires_grad_(), changed, v)
    changed.add_(1.0)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


AWKWARD = {
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "head dim apart": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "off by an element": lambda x: torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape),
    "rows an odd number apart": lambda x: functional.pad(x, (0, 1))[..., :-1],
    "row by row the same": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("awkward", AWKWARD)
def test_tensors_that_kernels_cannot_read_are_copied(awkward):
    dout, q, k, v = draws(dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, AWKWARD[awkward](k), AWKWARD[awkward](v))]
    assert not single.takes(backends.BACKENDS["cpu"], *inputs)
    visible = torch.ones(48, 48, dtype=torch.bool).tril()
    with torch.no_grad():
        exact, _ = naive(*inputs, visible, 0.25)
    plain = functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    out = dist.attention(*inputs, causal=True)
    assert_close(out, exact, exact, what="out")
    names = ("dq", "dk", "dv")
    pairs = zip(names, gradients(out, inputs, dout), gradients(plain, inputs, dout), strict=True)
    for name, found, wanted in pairs:
        assert_close(found, wanted, wanted, what=name)


def test_padded_head_dims_take_the_general_path():
    _, q, k, v = draws(dim=20)
    assert single.takes(backends.BACKENDS["cpu"], q, k, v)
    assert not single.takes(backends.BACKENDS["flash"], q, k, v)


def test_a_gradient_that_is_one_number_seen_as_many():
    _, *inputs = draws(dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    found = torch.autograd.grad(dist.attention(*inputs).sum(), inputs)
    dense = gradients(dist.attention(*inputs), inputs, torch.ones_like(inputs[0]))
    assert all(map(torch.equal, found, dense))


@pytest.mark.parametrize(
    ("mask", "tokens", "one"),
    [
        (Mask(causal=True), 12, True),
        (Mask(), (12, 7), True),
        (Mask(causal=True, window=12), 12, True),
        (Mask(causal=True, window=4), 12, False),
        (Mask(causal=True, documents=(5, 7)), 12, False),
        (Mask(causal=True, q_offset=3), (9, 12), False),
        (Mask(), (0, 7), False),
        (Mask(), (7, 0), False),
    ],
)
def test_what_is_one_piece(mask, tokens, one):
    queries, keys = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    case = AttentionCase.of(
        Context(), tokens=queries, kv_tokens=keys, heads=(2, 2), head_dim=8, item_bytes=4, mask=mask
    )
    assert single.is_single(schedule(Context(), case)) == one


def test_ranks_that_talk_are_not_alone():
    context = Context(ring=2)
    case = AttentionCase.of(
        context, tokens=8, heads=(2, 2), head_dim=8, item_bytes=4, mask=Mask(causal=True)
    )
    assert not any(single.is_single(schedule(context, case.at(rank))) for rank in range(2))
