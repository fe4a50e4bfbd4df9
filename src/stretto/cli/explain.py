"""`stretto explain`: what a plan asks for, costs and is limited by. Imports no torch."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from stretto.cli.limits import COUNT
from stretto.cli.whole import AT_LEAST_1
from stretto.cluster.model import Cluster
from stretto.cost.train_words import bytes_of
from stretto.errors import ConfigError
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import Context, StepsCase
from stretto.quantities import parse
from stretto.search import judge
from stretto.search.resolve import resolve
from stretto.workload.denoise import flow_noise
from stretto.workload.model import read_workload
from stretto.workload.train import Dtype, Training

_Count = Annotated[int | None, AT_LEAST_1]
#: Of one sequence, where --tokens does not say; as in `stretto plan train`.
_TOKENS = 65536
_Shift = Annotated[float | None, Parameter(validator=validators.Number(gt=0))]


def explain(
    plan: str,
    *,
    ranks: _Count = None,
    workload: Path | None = None,
    model: str | None = None,
    tokens: _Count = None,
    sequences: _Count = None,
    dtype: Dtype | None = None,
    window: _Count = None,
    cluster: str | None = None,
    diff: str | None = None,
    steps: Annotated[int | None, COUNT] = None,
    shift: _Shift = None,
    guided_bytes: str | None = None,
    json: bool = False,
) -> int:
    """Time, bytes and limits of a plan. Without workload and cluster: ranks, windows, bytes.

    Of a training plan: exact bytes per phase, rank and link class for a workload (or --model and
    --tokens), and with a cluster predicted seconds and memory.

    Parameters
    ----------
    plan
        A plan file, or the name of an attention plan: ring, ulysses, usp(2), startrail(2), tile(2),
        kv-allgather, pass-q, double-ring(2).
    ranks
        Ranks of a named plan, by default all devices of --cluster.
    workload
        A workload file; needs --cluster too, unless it is one of training.
    model
        Of a training plan, in place of --workload: a preset, a config.json or its folder.
    tokens
        Tokens of one sequence, with --model.
    sequences
        Sequences of one step, with --model.
    dtype
        Of activations and messages, with --model; by default bf16.
    window
        Keys that a token sees, with --model; by default what the model says.
    cluster
        A cluster file, or the name of a preset such as h100-x8.
    diff
        A second plan file or name, to set beside the first.
    steps
        Denoising steps, where there is no workload: shows the windows.
    shift
        Shift of the flow-matching noise grid that goes with --steps, by default 1.
    guided_bytes
        Size of one guided prediction, as in "1.2 MB": shows the exact bytes of each step rank.
    json
        Print one JSON object.
    """
    if shift is not None and steps is None:
        raise ConfigError(f"--shift {shift:g} without --steps: it shapes the noise grid of those")
    plans = _plans([each for each in (plan, diff) if each is not None], ranks, cluster)
    fields = {"tokens": tokens, "sequences": sequences, "dtype": dtype, "window": window}
    job = _job(plans, workload, model, {k: v for k, v in fields.items() if v is not None})
    if job is not None or plans[0].kind == "train":
        if steps is not None or guided_bytes is not None:
            raise ConfigError("--steps and --guided-bytes are of a generation, not of training")
        print(_training(plans, job, cluster, json=json))
        return 0
    if workload is None and cluster is None:
        print(_without_times(plans, steps, shift or 1.0, _bytes(guided_bytes, steps), json=json))
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


def _plans(asked: Sequence[str], ranks: int | None, cluster: str | None) -> list[Plan]:
    """The plans of files and names, all of one kind. Raises ConfigError, PlanMismatch."""
    named = [each for each in asked if not _is_file(each)]
    if ranks is not None and not named:
        raise ConfigError("--ranks is of a plan that is named; a plan file says its own")
    if named and ranks is None:
        if cluster is None:
            raise ConfigError(
                f"plan {named[0]!r} is no file, and as a name it lacks a number of ranks\n"
                "  to fix: --ranks or --cluster beside a name, or the path of a plan file"
            )
        ranks = Cluster.read(cluster).size
    found = [_named(each, ranks or 1) if each in named else read_plan(each) for each in asked]
    if len({each.kind for each in found}) > 1:
        kinds = [f"{name} to {each.kind}" for name, each in zip(asked, found, strict=True)]
        raise ConfigError(f"{' and '.join(kinds)}: plans of one kind stand side by side")
    return found


def _is_file(plan: str) -> bool:
    path = Path(plan)
    return path.exists() or path.name != plan or path.suffix in (".yaml", ".yml", ".json")


def _named(name: str, ranks: int) -> Plan:
    return Plan(kind="train", cp=Context.named(name, ranks))


def _job(
    plans: list[Plan], workload: Path | None, model: str | None, fields: dict[str, Any]
) -> Training | None:
    """The training workload that is meant, if any; `fields` are those of --model."""
    if model is None and fields:
        given = ", ".join(f"--{name}" for name in fields)
        raise ConfigError(f"{given} without --model: a --workload has its own")
    if model is not None:
        if workload is not None:
            raise ConfigError("--model stands in for a workload: give one or the other")
        if {each.kind for each in plans} != {"train"}:
            raise ConfigError(f"--model {model} is trained, and the plan is one of a generation")
        return Training.of(model, **{"tokens": _TOKENS, "sequences": plans[0].dp.degree} | fields)
    found = read_workload(workload) if workload is not None else None
    kinds = {plan.kind for plan in plans}
    if isinstance(found, Training) and kinds != {"train"}:
        raise ConfigError(f"{workload} describes training, and the plan is one of a generation")
    if found is not None and not isinstance(found, Training) and "train" in kinds:
        raise ConfigError(f"{workload} describes a generation, and the plan is one of training")
    return found if isinstance(found, Training) else None


def _training(plans: list[Plan], job: Training | None, cluster: str | None, *, json: bool) -> str:
    if job is None and cluster is not None:
        raise ConfigError(
            f"--cluster {cluster} and nothing to train on it\n"
            "  to fix: --model with --tokens, or a --workload"
        )
    if not json:
        return judge.explain(plans[0], job, cluster, diff=plans[1] if plans[1:] else None)
    if job is None:
        facts = [
            {"plan": str(each), "ranks": each.world_size, "axes": each.sizes} for each in plans
        ]
        return jsonlib.dumps({"plans": facts}, indent=2)
    found = [_priced(job, cluster, each) for each in plans]
    return jsonlib.dumps({"plans": found}, indent=2)


def _priced(job: Training, cluster: str | None, plan: Plan) -> dict:
    """Exact bytes of one attention as plain data, with a cluster beside an estimate."""
    known = Cluster.read(cluster) if cluster is not None else None
    found = {"plan": str(plan)} if known is None else judge.estimate(job, known, plan).as_dict()
    exact = bytes_of(job, plan, known)
    lines = [
        {"pass": name, **line.as_dict()}
        for name, part in (("forward", exact.forward), ("backward", exact.backward))
        for line in part
    ]
    return found | {
        "one_attention": {
            "bytes_per_rank": list(exact.per_rank),
            "link_bytes": exact.links if known else None,
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
