"""Plain torch modules that call SDPA under a plan, and the explicit attention module."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stretto.errors import UnsupportedModel
from stretto.mesh.local import LocalWorld
from stretto.parallel.api import parallelize
from stretto.parallel.batch import shard
from stretto.parallel.context import Attention
from stretto.plan.context import Context
from stretto.testing.ranks import run_ranks

RING = Context(ring=2)
WIDTH, HEADS = 16, 4


class SelfAttention(nn.Module):
    """Calls SDPA itself; `options` go to it, `recompute` puts a checkpoint around the call."""

    def __init__(self, recompute=None, **options):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.recompute = recompute
        self.options = options

    def forward(self, x):
        def attend(q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, **self.options)

        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.recompute is None:
            mixed = attend(q, k, v)
        else:
            mixed = checkpoint(attend, q, k, v, use_reentrant=self.recompute)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Explicit(nn.Module):
    """The same through stretto's module."""

    def __init__(self, **mask):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention = Attention()
        self.mask = mask

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.attention(q, k, v, **self.mask).transpose(1, 2).flatten(2)


def model(make, *parts):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), *parts).double()


def tokens(count=10):
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def compare(make, plan, *, causal, documents=None, run=lambda part, x: part(x)):
    """Outputs and summed gradients on threads against one rank."""
    x, plain = tokens(), model(make)
    right = run(plain, x)
    right.square().sum().backward()

    def body(mesh):
        bound = model(make)
        with parallelize(bound, plan, mesh=mesh):
            out = run(bound, shard(x, mesh, plan, causal=causal, documents=documents))
            out.square().sum().backward()
        rows = shard(right, mesh, plan, causal=causal, documents=documents)
        torch.testing.assert_close(out, rows, rtol=1e-11, atol=1e-13)
        return [parameter.grad for parameter in bound.parameters()]

    for found, parameter in zip(
        zip(*LocalWorld(plan.sizes).run(body), strict=True), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(sum(found), parameter.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "plan", [Context(), RING, Context(ring=3), Context(ulysses=2, ring=2)], ids=Context.short
)
def test_sdpa_callers_equal_one_rank(plan, causal):
    compare(lambda: SelfAttention(is_causal=causal), plan, causal=causal)


@pytest.mark.parametrize(
    "mask",
    [{}, {"causal": True}, {"causal": True, "window": 3}, {"causal": True, "documents": (3, 0, 7)}],
    ids=str,
)
def test_explicit_modules_equal_one_rank(mask):
    options = {"causal": mask.get("causal", False), "documents": mask.get("documents")}
    compare(lambda: Explicit(**mask), Context(ring=3), **options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_module(reentrant):
    def run(part, x):
        x = part[0](x)
        return checkpoint(part[1], x, use_reentrant=reentrant)

    compare(lambda: SelfAttention(is_causal=True), RING, causal=True, run=run)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_the_module_is_refused(reentrant):
    bound = model(lambda: SelfAttention(recompute=reentrant))
    with (
        parallelize(bound, Context(), mesh=LocalWorld({}).mesh(0)),
        pytest.raises(UnsupportedModel, match="checkpoint between the module and its attention"),
    ):
        bound(tokens())


def test_checkpoint_inside_would_recompute_alone():
    """Why it is refused: without the check backward sees this rank's keys only."""
    from stretto.parallel.sdpa import SdpaScope

    def gradient(recompute, mesh):
        bound = model(lambda: SelfAttention(recompute=recompute))
        with parallelize(bound, RING, mesh=mesh):
            bound(shard(tokens(), mesh, RING, causal=False)).square().sum().backward()
        return bound[1].qkv.weight.grad

    before = SdpaScope._check_recomputed
    SdpaScope._check_recomputed = lambda self: None
    try:
        alone = LocalWorld(RING.sizes).run(lambda mesh: gradient(True, mesh))
    finally:
        SdpaScope._check_recomputed = before
    right = LocalWorld(RING.sizes).run(lambda mesh: gradient(None, mesh))
    assert not torch.allclose(sum(alone), sum(right), rtol=1e-3)


def test_leaving_restores_modules():
    bound = nn.Sequential(model(SelfAttention), model(Explicit))
    mesh = LocalWorld({}).mesh(0)
    with parallelize(bound, Context(), mesh=mesh) as handle:
        assert set(handle.bound) == {"0.1", "1.1.attention"}
        assert "forward" in bound[0][1].__dict__
        with pytest.raises(UnsupportedModel, match="bound to a plan already"):
            parallelize(bound, Context(), mesh=mesh)
    assert "forward" not in bound[0][1].__dict__
    assert bound[1][1].attention.mesh is None
    assert bound[1][1].attention.plan is None


def test_two_plans_in_one_process():
    """Bound models of different plans, and SDPA outside both, do not touch one another."""
    one, two = model(SelfAttention), model(SelfAttention)
    x = tokens()
    right = one(x)
    meshes = [LocalWorld({}).mesh(0) for _ in range(2)]
    with parallelize(one, Context(), mesh=meshes[0]):
        with parallelize(two, Context(), mesh=meshes[1]):
            torch.testing.assert_close(two(x), right)
            masked = torch.zeros(10, 10, dtype=torch.bool).fill_diagonal_(True)
            functional.scaled_dot_product_attention(x, x, x, attn_mask=masked)
        torch.testing.assert_close(one(x), right)
        assert torch.equal(two(x), right)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_mask": torch.ones(10, 10, dtype=torch.bool)}, r"attn_mask of shape \(10, 10\)"),
        ({"dropout_p": 0.5}, r"attention dropout 0\.5"),
    ],
)
def test_what_sdpa_can_and_a_plan_cannot(options, reason):
    bound = model(lambda: SelfAttention(**options))
    with (
        parallelize(bound, Context(), mesh=LocalWorld({}).mesh(0)),
        pytest.raises(UnsupportedModel, match=reason),
    ):
        bound(tokens())


@pytest.mark.parametrize(
    "part",
    [
        nn.Conv1d(WIDTH, WIDTH, 3),
        nn.MultiheadAttention(WIDTH, 2),
        nn.LSTM(WIDTH, WIDTH),
        nn.AvgPool1d(2),
        nn.BatchNorm1d(WIDTH),
        nn.InstanceNorm1d(WIDTH),
        nn.GroupNorm(2, WIDTH),
    ],
    ids=lambda part: type(part).__name__,
)
def test_other_mixing_is_refused_by_name(part):
    bound = model(SelfAttention, part)
    kind = type(part).__name__
    with pytest.raises(UnsupportedModel, match=rf"2 \({kind}\) mixes tokens outside attention"):
        parallelize(bound, Context(), mesh=LocalWorld({}).mesh(0))
    assert "forward" not in bound[1].__dict__


def test_keys_of_another_length_are_refused():
    class Cross(nn.Module):
        def forward(self, x):
            x = x[:, None]
            return functional.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])

    def body(mesh):
        with parallelize(Cross(), RING, mesh=mesh) as handle:
            handle.model(shard(tokens(), mesh, RING, causal=False))

    with pytest.raises(UnsupportedModel, match="whether the keys are shards or whole"):
        LocalWorld(RING.sizes).run(body)


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModel, match="holds no attention that is known"):
        parallelize(nn.Linear(2, 2), Context(), mesh=LocalWorld({}).mesh(0))


def gradients_of_rank(mesh):
    bound = model(SelfAttention)
    with parallelize(bound, RING, mesh=mesh):
        checkpointed = checkpoint(
            bound, shard(tokens(), mesh, RING, causal=False), use_reentrant=False
        )
        checkpointed.square().sum().backward()
    return [parameter.grad for parameter in bound.parameters()]


@pytest.mark.ranks
def test_processes_agree_with_one_rank():
    plain = model(SelfAttention)
    plain(tokens()).square().sum().backward()
    parts = run_ranks(gradients_of_rank, RING.sizes)
    for found, parameter in zip(zip(*parts, strict=True), plain.parameters(), strict=True):
        torch.testing.assert_close(sum(found), parameter.grad, rtol=1e-11, atol=1e-12)
