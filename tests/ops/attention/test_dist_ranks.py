"""Attention over gloo ranks: the bits of virtual ranks, run after run."""

import pytest
import torch

import stretto
from stretto.mesh.count import CountingMesh
from stretto.plan.context import Context, StarTrail, Tile, named_points
from stretto.plan.ranges import Mask
from stretto.testing.ranks import run_ranks
from tests.ops.attention.whole import Inputs, indices, joined, part, run_whole

pytestmark = pytest.mark.ranks

CAUSAL = Mask(causal=True)


def one_rank(mesh, contexts, inputs):
    """Results of this rank for every context, and what it sent."""
    found = []
    for context in contexts:
        case, counting, rank = inputs.case(context), CountingMesh(mesh), mesh.rank("cp")
        at = indices(case.q_rows[rank]), indices(case.kv_rows[rank])
        job = {"mesh": counting, "context": context, "case": case.at(rank)}
        found.append((rank, part(inputs, *at, **job), (counting.traffic, counting.calls)))
    return found


def same_as_virtual(contexts, inputs):
    """Contexts on one mesh's sizes: gloo and threads give the same bits and bytes."""
    ranks = run_ranks(one_rank, contexts[0].sizes, contexts, inputs, timeout_s=110)
    for number, context in enumerate(contexts):
        case = inputs.case(context)
        at = [[indices(rows) for rows in held] for held in (case.q_rows, case.kv_rows)]
        whole = joined(context, case, [found[number] for found in ranks], *at)
        whole.assert_close(inputs)
        whole.assert_bytes()
        virtual = run_whole(context, inputs)
        assert all(torch.equal(a, b) for a, b in zip(whole.results, virtual.results, strict=True))


def by_sizes(contexts):
    """Contexts grouped by the axes they need, so that ranks start once per group."""
    groups = {}
    for context in contexts:
        groups.setdefault(tuple(context.sizes.items()), []).append(context)
    return list(groups.values())


POINTS_4 = by_sizes(
    [
        *named_points(4, 4, 4).values(),
        Context(team=2, ring=2, schedule=StarTrail(circulate="kv", keep="far")),
        Context(team=2, ring=2, schedule=Tile(keep="all")),
    ]
)
POINTS_8 = by_sizes([Context(team=2, ring=4, schedule=Tile(ring_inner=2, keep="far"))])


@pytest.mark.parametrize("contexts", POINTS_4, ids=lambda c: f"{len(c)} of {c[0].short()}")
def test_four_processes_give_the_bits_of_four_threads(contexts):
    same_as_virtual(contexts, Inputs(33, heads=(4, 4), mask=CAUSAL, dtype=torch.float32))


@pytest.mark.parametrize("contexts", POINTS_8, ids=lambda c: c[0].short())
def test_two_levels_on_eight_processes(contexts):
    same_as_virtual(contexts, Inputs(33, heads=(4, 2), mask=CAUSAL))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [8, 16])
def test_all_named_points_on_more_processes(ranks):
    for contexts in by_sizes(named_points(ranks, ranks, ranks).values()):
        same_as_virtual(contexts, Inputs(67, heads=(ranks, ranks), mask=CAUSAL))


def trained(mesh, steps):
    """Outputs and gradients of the public operator, autograd included, `steps` times."""
    inputs = Inputs(32, heads=(4, 2), mask=CAUSAL)
    case = inputs.case(Context(ring=2, team=2))
    at = indices(case.q_rows[mesh.rank("cp")])
    runs = []
    for _ in range(steps):
        leaves = [x[:, :, at].requires_grad_() for x in inputs.tensors[:3]]
        out = stretto.attention(*leaves, mesh=mesh, causal=True)
        out.backward(inputs.tensors[3][:, :, at])
        runs.append((out.detach(), *(x.grad for x in leaves)))
    return at, runs


def test_autograd_in_processes_repeats_bit_by_bit():
    inputs = Inputs(32, heads=(4, 2), mask=CAUSAL)
    expected = inputs.expected[0], *inputs.expected[2:]
    for at, (first, again) in run_ranks(trained, {"ring_out": 2, "team_out": 2}, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for got, whole in zip(first, expected, strict=True):
            torch.testing.assert_close(got, whole[:, :, at], rtol=0, atol=1e-12)
