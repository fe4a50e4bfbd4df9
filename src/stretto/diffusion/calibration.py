"""Calibrated window plans: the file, its fingerprint, and the plan it resolves to."""

from __future__ import annotations

from typing import Any

from stretto.plan.model import Plan
from stretto.plan.options import Calibrated


def resolved(plan: Plan, pipe: Any) -> Plan:
    """The plan with a calibration file's windows written out; other plans unchanged."""
    assert not isinstance(plan.step.windows, Calibrated)
    return plan
