"""Equal evaluations of virtual ranks, made once: the same bits from fewer forward passes."""

import pytest
import torch

from stretto.diffusion.api import emulate
from stretto.diffusion.once import Once
from stretto.plan.model import Plan
from stretto.plan.options import Guidance, Parastep, Steps
from stretto.testing import models
from stretto.testing.exactness import counted

#: One call a step, two calls a step, a scheduler that writes into its arguments, a side network.
CASES = ("sd15-ddim", "flux-true-cfg", "sd3-flow", "sd15-unipc", "sd15-inpaint")
PLANS = (
    Plan(step=Steps(degree=3, exact_split=False)),
    Plan(step=Steps(degree=3, windows=Parastep())),
    Plan(step=Steps(degree=2, windows=Parastep()), cfg=Guidance(degree=2)),
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_same_bits_and_reports_from_fewer_passes(name, plan):
    case = models.CASES[name]
    outputs, passes, evaluations = [], [], []
    for reuse in (False, True):
        pipe = case.pipeline()
        with emulate(pipe, plan, reuse=reuse) as run, counted(pipe) as seen:
            outputs.append(case.call(pipe))
        passes.append(sum(seen.values()))
        evaluations.append([report.evaluations for report in run.reports])
    assert torch.equal(*outputs)
    assert evaluations[0] == evaluations[1]
    assert passes[1] < passes[0]


def test_exact_steps_cost_one_pass():
    case, plan = models.CASES["sd3-flow"], PLANS[0]
    pipe = case.pipeline()
    with emulate(pipe, plan, reuse=True) as run, counted(pipe) as seen:
        case.call(pipe)
    steps = sum(run.report.sizes)
    # Ranks without a place in a short first window learn the output's form at the first step.
    assert sum(seen.values()) == steps * case.calls_per_step


def test_only_equal_arguments_are_equal():
    calls = []

    def forward(x, t, scale=1.0):
        calls.append((x, t, scale))
        return (x * scale + t,)

    once, x = Once(), torch.ones(2, 3)
    wrapped = once.wrapped("unet", forward)
    first = wrapped(x, torch.tensor(1.0))
    assert torch.equal(wrapped(x.clone(), torch.tensor(1.0))[0], first[0])
    assert len(calls) == 1
    wrapped(x, torch.tensor(2.0))
    wrapped(x, torch.tensor(1.0), scale=2.0)
    wrapped(x.double(), torch.tensor(1.0))
    once.wrapped("other", forward)(x, torch.tensor(1.0))
    assert len(calls) == 5


def test_what_was_kept_does_not_change_with_what_was_given():
    wrapped = Once().wrapped("unet", lambda x: (x + 1,))
    x = torch.zeros(2)
    output = wrapped(x)[0]
    output.fill_(9)
    assert wrapped(torch.zeros(2))[0].tolist() == [1, 1]
    x.fill_(5)
    assert wrapped(x)[0].tolist() == [6, 6]
