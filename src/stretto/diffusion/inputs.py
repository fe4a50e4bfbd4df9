"""What `parallelized` and `emulate` are given, looked at before anything is hooked."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from stretto.errors import ConfigError, PlanMismatch, RanksDisagree, UnsupportedPipeline
from stretto.mesh.mesh import Mesh
from stretto.plan.io import read_plan
from stretto.plan.model import Plan

_PREDICTOR = ("reset", "append", "close_window", "guesses")
#: Numbers of a call that shape what a rank gives back, and not the steps before it.
_OF_THE_RESULT = ("return_dict", "decode_chunk_size")


def plan_in(plan: Any) -> Plan:
    """A plan, or that of a plan file. Raises ConfigError for anything else, or one to train."""
    if not isinstance(plan, (Plan, str, os.PathLike)):
        raise ConfigError(
            f"{plan!r:.80} is a {type(plan).__name__}, no plan\n"
            "  to fix: stretto.Plan(step=2), or the path of a plan file"
        )
    found = plan if isinstance(plan, Plan) else read_plan(plan)
    if found.kind != "generate":
        raise PlanMismatch(
            f"a plan to {found.kind} for a pipeline; needed is kind: generate\n"
            "  to fix: Plan(step=2); a model to train takes stretto.parallelize"
        )
    return found


def check_mesh(mesh: Any) -> None:
    """Raise ConfigError for what is no mesh."""
    if not isinstance(mesh, Mesh):
        raise ConfigError(
            f"{mesh!r:.80} is a {type(mesh).__name__}, no mesh\n  to fix: mesh=init_mesh(plan)"
        )


def check_pipeline(pipe: Any) -> None:
    """Raise UnsupportedPipeline for what cannot be called, or has no scheduler that steps."""
    steps = callable(getattr(getattr(pipe, "scheduler", None), "step", None))
    if not callable(pipe) or not steps or isinstance(pipe, torch.nn.Module):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} is no pipeline of denoising steps: it needs a call and a "
            "`scheduler` with step(model_output, timestep, sample)\n"
            "  to fix: pass the diffusers pipeline itself; of a pipeline of pipelines, a part"
        )


def check_predictors(predictors: Any, ranks: int) -> None:
    """Raise ConfigError unless there is a predictor, by its methods, for every rank."""
    if not isinstance(predictors, Sequence) or len(predictors) != ranks:
        seen = len(predictors) if isinstance(predictors, Sequence) else type(predictors).__name__
        raise ConfigError(
            f"predictors: {seen} for {ranks} virtual ranks\n"
            "  why: each rank keeps a history of its own\n"
            f"  to fix: a list of {ranks} objects"
        )
    for predictor in predictors:
        missing = [name for name in _PREDICTOR if not callable(getattr(predictor, name, None))]
        if not hasattr(predictor, "needs_own_output"):
            missing.append("needs_own_output")
        if missing:
            raise ConfigError(
                f"a {type(predictor).__name__} as predictor lacks {', '.join(missing)}; see "
                "stretto.diffusion.predict.Predictor for what is asked of it"
            )


def numbers_of(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers among a call's arguments, defaults included, by name.

    None is none: it stands for a default that the pipeline finds, and another rank may name.
    """
    try:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = bound.arguments
    except TypeError:
        # The call itself says so, of the argument that it cannot take.
        named = dict(kwargs)
    return {
        name: _plain(value)
        for name, value in named.items()
        if name not in _OF_THE_RESULT and _is_number(value)
    }


def check_alike(mesh: Mesh, plan: Plan, numbers: Mapping[str, Any]) -> None:
    """Raise RanksDisagree, on all ranks, for a plan or a number that is not the same on all.

    A guidance scale never reaches the denoiser, and numbers of steps may begin alike: two pictures
    would be blended, or messages of two sizes meet.
    """
    refuse_unlike(
        mesh,
        {"the plan": repr(plan), **numbers},
        why="each rank takes all steps, with predictions of all ranks",
        to_fix="the same call under the same plan on every rank",
    )


def refuse_unlike(mesh: Mesh, told: Mapping[str, Any], *, why: str, to_fix: str) -> None:
    """Raise RanksDisagree, on all ranks, for a name of which two ranks tell unlike values.

    Values are what JSON keeps. Ranks that do not tell of a name are not compared.
    """
    if mesh.world_size == 1:
        return
    found = mesh.gather_bytes(json.dumps(told).encode())
    if len(set(found)) == 1:
        return
    ranks = [json.loads(seen) for seen in found]
    for name in dict.fromkeys(name for seen in ranks for name in seen):
        values = {rank: seen[name] for rank, seen in enumerate(ranks) if name in seen}
        first = min(values)
        other = next((rank for rank in values if values[rank] != values[first]), None)
        if other is not None:
            raise RanksDisagree(
                f"{name}: rank {first} has {values[first]}, rank {other} {values[other]}\n"
                f"  why: {why}\n  to fix: {to_fix}"
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, Real) for item in value)
    return isinstance(value, Real)


def _plain(value: Any) -> Any:
    """A value that JSON keeps, equal where the values are: 5 and 5.0 are one scale."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    number = float(value)
    return str(int(number) if number.is_integer() else number)
