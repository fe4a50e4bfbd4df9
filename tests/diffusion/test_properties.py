"""O8 and O12: random plans stay exact, compiled denoisers stay compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.diffusion.api import emulate, parallelized
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Steps
from stretto.testing import models
from stretto.testing.exactness import Oracle, reference

NAMES = ("sd15-ddim", "sd15-unipc", "sd15-euler-ancestral", "sd3-flow", "cogvideox-dpm")


@pytest.fixture(scope="module")
def known():
    return {name: reference(models.CASES[name]) for name in NAMES}


@st.composite
def plans(draw, num_steps=8):
    degree = draw(st.integers(2, 5))
    sizes = [1]
    while sum(sizes) < num_steps:
        sizes.append(draw(st.integers(1, min(degree, num_steps - sum(sizes)))))
    return degree, tuple(sizes)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(name=st.sampled_from(NAMES), plan=plans())
def test_any_windows_with_perfect_guesses(known, name, plan):
    degree, sizes = plan
    found, case = known[name], models.CASES[name]
    option = Steps(degree=degree, windows=Listed(sizes=sizes), exact_split=False)
    oracles = [Oracle(found.guided) for _ in range(degree)]
    with emulate(found.pipe, Plan(step=option), predictors=oracles) as run:
        case.call(found.pipe)
    assert all(torch.equal(case.tensor(r), found.output) for r in run.results)
    assert {r.sizes for r in run.reports} == {sizes}


@pytest.mark.parametrize("way", ["module.compile", "torch.compile"])
def test_a_compiled_denoiser_compiles_once(way):
    """Hooks sit outside the compiled region, so that neither they nor windows recompile it."""
    case = models.CASES["sd3-flow"]
    pipe = case.pipeline()
    plain = case.call(pipe)
    graphs = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    if way == "module.compile":
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    case.call(pipe)
    compiled = len(graphs)
    assert compiled
    plan = Plan()
    with parallelized(pipe, plan, mesh=LocalWorld(plan.sizes).mesh(0)):
        hooked = case.call(pipe)
    with emulate(pipe, Plan(step=Steps(degree=2, exact_split=False))):
        case.call(pipe)
    assert len(graphs) == compiled
    assert torch.allclose(hooked, plain, atol=1e-5)
