"""Bytes of guidance: what ranks sent is what `Guidance.wire` declares, by calls and by rows."""

import pytest

from stretto import axes
from stretto.diffusion.api import emulate
from stretto.plan.model import Plan
from stretto.plan.options import Fixed, GuidanceCase, Parastep, Steps
from stretto.plan.traffic import Traffic
from stretto.testing import models

#: Guidance in two calls of a row each, and in one call of two rows.
WAN, DDIM = models.CASES["wan-flow"], models.CASES["sd15-ddim"]


@pytest.mark.parametrize("case", [WAN, DDIM], ids=["calls", "batch"])
@pytest.mark.parametrize("windows", [Parastep(), Fixed(warmup=2)], ids=str)
def test_bytes_of_guidance(windows, case):
    plan, pipe = Plan(step=Steps(degree=3, windows=windows), cfg=2), case.pipeline()
    with emulate(pipe, plan) as run:
        case.call(pipe)
        case.call(pipe)
    for rank, report in enumerate(run.reports):
        place = axes.coordinates(rank, plan.sizes)
        sent = Traffic()
        for lane, num_bytes in report.traffic:
            if lane.phase == "guidance":
                sent.add(*lane, num_bytes)
        assert sent == plan.cfg.wire(case_of(report, case, place["step"], place["cfg"]))
        assert sent.total() > 0


def case_of(report, case, step_rank, cfg_rank):
    own = [size for size in report.sizes if size == 1 or step_rank < size]
    guesses = sum(step_rank for size in own if size > 1)
    published = report.plan.step.guesses == "own"
    return GuidanceCase(
        evaluations=len(own),
        calls=case.calls_per_step,
        rank=cfg_rank,
        raw_bytes=report.guided_bytes * (2 if case.batched else 1),
        guided_bytes=report.guided_bytes,
        split=case.guidance,
        guesses=guesses if published else 0,
    )
