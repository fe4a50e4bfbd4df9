"""`stretto explain`: what a plan asks for, costs and is limited by. Imports no torch."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from stretto.errors import ConfigError
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import StepsCase
from stretto.quantities import parse
from stretto.search import judge
from stretto.search.resolve import resolve
from stretto.workload.denoise import flow_noise

_Steps = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
_Shift = Annotated[float, Parameter(validator=validators.Number(gt=0))]


def explain(
    plan: Path,
    *,
    workload: Path | None = None,
    cluster: str | None = None,
    diff: Path | None = None,
    steps: _Steps = None,
    shift: _Shift = 1.0,
    guided_bytes: str | None = None,
    json: bool = False,
) -> int:
    """Time, bytes and limits of a plan. Without workload and cluster: ranks, windows, bytes.

    Parameters
    ----------
    plan
        A plan file.
    workload
        A workload file; needs --cluster too.
    cluster
        A cluster file, or the name of a preset such as h100-x8.
    diff
        A second plan file to set beside the first.
    steps
        Denoising steps, where there is no workload: shows the windows.
    shift
        Shift of the flow-matching noise grid that goes with --steps.
    guided_bytes
        Size of one guided prediction, as in "1.2 MB": shows the exact bytes of each step rank.
    json
        Print one JSON object.
    """
    plans = [read_plan(path) for path in (plan, diff) if path is not None]
    if workload is None and cluster is None:
        print(_without_times(plans, steps, shift, _bytes(guided_bytes, steps), json=json))
        return 0
    if steps is not None or guided_bytes is not None:
        raise ConfigError("--steps and --guided-bytes stand in for a workload: give one or other")
    if workload is None or cluster is None:
        raise ConfigError("times need both --workload and --cluster, one of them is missing")
    if json:
        found = [judge.estimate(workload, cluster, each).as_dict() for each in plans]
        print(jsonlib.dumps({"plans": found}, indent=2))
    else:
        other = plans[1] if diff is not None else None
        print(judge.explain(plans[0], workload, cluster, diff=other))
    return 0


def _bytes(text: str | None, steps: int | None) -> int | None:
    if text is None:
        return None
    if steps is None:
        raise ConfigError("--guided-bytes counts bytes of a whole run and needs --steps too")
    try:
        # A bare number on the command line is text as well.
        return int(parse("B", float(text) if text.isdigit() else text))
    except ValueError as error:
        raise ConfigError(f"--guided-bytes: {error}") from None


def _without_times(
    plans: list[Plan], steps: int | None, shift: float, guided_bytes: int | None, *, json: bool
) -> str:
    if json:
        rows = [_facts(each, steps, shift, guided_bytes) for each in plans]
        return jsonlib.dumps({"plans": rows}, indent=2)
    if steps is None:
        return "\n\n".join(each.explain() for each in plans)
    return "\n\n".join(judge.outline(each, steps, shift, guided_bytes) for each in plans)


def _facts(plan: Plan, steps: int | None, shift: float, guided_bytes: int | None) -> dict:
    facts: dict = {"plan": str(plan), "ranks": plan.world_size, "axes": plan.sizes}
    if steps is not None:
        sizes = resolve(plan.step, flow_noise(steps, shift))
        facts["windows"] = list(sizes)
        if guided_bytes is not None:
            cases = [StepsCase(sizes, rank, guided_bytes) for rank in range(plan.step.degree)]
            facts["bytes_per_step_rank"] = [plan.step.wire(case).total() for case in cases]
    return facts
