"""Options that do not fit the steps of a run are refused before it."""

import pytest

from stretto.errors import PlanMismatch
from stretto.plan.options import Steps, Tail
from stretto.search.resolve import resolve
from stretto.workload.denoise import flow_noise


def test_a_depth_beyond_the_steps_is_refused():
    noise = flow_noise(4, 1.0)
    assert resolve(Steps(degree=2, windows=Tail(depth=4)), noise) == (1, 1, 1, 1)
    with pytest.raises(PlanMismatch, match=r"depth 99 of 4 steps[\s\S]*depth 3 to 4"):
        resolve(Steps(degree=2, windows=Tail(depth=99)), noise)
