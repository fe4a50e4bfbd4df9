"""What `parallelized` and `emulate` are given, looked at before anything is hooked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from stretto.errors import ConfigError, UnsupportedPipeline
from stretto.mesh.mesh import Mesh
from stretto.plan.io import read_plan
from stretto.plan.model import Plan

_PREDICTOR = ("reset", "append", "close_window", "guesses")


def plan_in(plan: Any) -> Plan:
    """A plan, or that of a plan file. Raises ConfigError for anything else."""
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise ConfigError(
            f"{plan!r:.80} is a {type(plan).__name__}, no plan\n"
            "  to fix: stretto.Plan(step=2), or the path of a plan file"
        )
    return read_plan(plan)


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
