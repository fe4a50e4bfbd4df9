"""Checks that options and their users share."""

import pytest

from stretto.errors import PlanMismatch
from stretto.plan.checks import check_trains
from stretto.plan.model import Plan
from stretto.plan.options import Context


@pytest.mark.parametrize("axes", [{"step": 2}, {"cfg": 2}, {"step": 2, "cfg": 2, "dp": 2}])
def test_axes_of_a_generation_are_refused_in_a_training(axes):
    named = ", ".join(f"{axis} {n}" for axis, n in axes.items() if axis != "dp")
    with pytest.raises(PlanMismatch, match=rf"{named} of a training\n[\s\S]*to fix: .*dp or cp"):
        check_trains(Plan(kind="train", **axes))


def test_axes_of_a_training_pass():
    check_trains(Plan(kind="train", dp=2, cp=Context(ring=2)))
    check_trains(Plan(kind="train"))
