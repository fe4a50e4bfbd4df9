"""`stretto explain`: what a plan asks for, costs and is limited by. Imports no torch."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from stretto.cluster.model import Cluster
from stretto.cost.train_words import bytes_of
from stretto.errors import ConfigError
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import StepsCase
from stretto.quantities import parse
from stretto.search import judge
from stretto.search.resolve import resolve
from stretto.workload.denoise import flow_noise
from stretto.workload.model import read_workload
from stretto.workload.train import Training

_Steps = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
_Shift = Annotated[float, Parameter(validator=validators.Number(gt=0))]


def explain(
    plan: Path,
    *,
    workload: Path | None = None,
    model: str | None = None,
    tokens: _Steps = None,
    sequences: _Steps = None,
    cluster: str | None = None,
    diff: Path | None = None,
    steps: _Steps = None,
    shift: _Shift = 1.0,
    guided_bytes: str | None = None,
    json: bool = False,
) -> int:
    """Time, bytes and limits of a plan. Without workload and cluster: ranks, windows, bytes.

    Of a training plan: exact bytes per phase, rank and link class for a workload (or --model and
    --tokens), and with a cluster predicted seconds and memory.

    Parameters
    ----------
    plan
        A plan file.
    workload
        A workload file; needs --cluster too, unless it is one of training.
    model
        Of a training plan, in place of --workload: a preset, a config.json or its folder.
    tokens
        Tokens of one sequence, with --model.
    sequences
        Sequences of one step, with --model.
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
    job = _job(plans, workload, model, tokens, sequences)
    if job is not None or plans[0].kind == "train":
        if steps is not None or guided_bytes is not None:
            raise ConfigError("--steps and --guided-bytes are of a generation, not of training")
        print(_training(plans, job, cluster, json=json))
        return 0
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


def _job(
    plans: list[Plan],
    workload: Path | None,
    model: str | None,
    tokens: int | None,
    sequences: int | None,
) -> Training | None:
    """The training workload that is meant, if any."""
    if model is None and (tokens is not None or sequences is not None):
        raise ConfigError("--tokens and --sequences belong to --model; a --workload has its own")
    if model is not None:
        if workload is not None:
            raise ConfigError("--model stands in for a workload: give one or the other")
        fallback = plans[0].dp.degree
        return Training.of(model, tokens or 65536, sequences=sequences or fallback)
    found = read_workload(workload) if workload is not None else None
    kinds = {plan.kind for plan in plans}
    if isinstance(found, Training) and kinds != {"train"}:
        raise ConfigError(f"{workload} describes training, and the plan is one of a generation")
    if found is not None and not isinstance(found, Training) and "train" in kinds:
        raise ConfigError(f"{workload} describes a generation, and the plan is one of training")
    return found if isinstance(found, Training) else None


def _training(plans: list[Plan], job: Training | None, cluster: str | None, *, json: bool) -> str:
    if not json:
        return judge.explain(plans[0], job, cluster, diff=plans[1] if plans[1:] else None)
    if job is None or cluster is None:
        facts = [
            {"plan": str(each), "ranks": each.world_size, "axes": each.sizes} for each in plans
        ]
        return jsonlib.dumps({"plans": facts}, indent=2)
    found = [_priced(job, cluster, each) for each in plans]
    return jsonlib.dumps({"plans": found}, indent=2)


def _priced(job: Training, cluster: str, plan: Plan) -> dict:
    """An estimate as plain data, with the exact bytes of one attention."""
    found, known = judge.estimate(job, cluster, plan), Cluster.read(cluster)
    exact = bytes_of(job, plan, known)
    lines = [
        {"pass": name, **line.as_dict()}
        for name, part in (("forward", exact.forward), ("backward", exact.backward))
        for line in part
    ]
    return found.as_dict() | {
        "one_attention": {
            "bytes_per_rank": list(exact.per_rank),
            "link_bytes": exact.links,
            "phases": lines,
            "steps": exact.steps,
            "peak_blocks": exact.peak_blocks,
        }
    }


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
