"""What `stretto generate` is asked for: its options in groups, and the plan and call they mean."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from stretto.cli.limits import COUNT, check_threads
from stretto.cli.whole import AT_LEAST_1, whole
from stretto.cluster import detect
from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import (
    PREDICTORS,
    Adaptive,
    Calibrated,
    Fixed,
    Guidance,
    Parastep,
    Steps,
    Tail,
    Windows,
)

if TYPE_CHECKING:
    from cyclopts import Token

SCHEDULES = {"tail": Tail, "parastep": Parastep, "fixed": Fixed, "adaptive": Adaptive}

_Degree = Annotated[int | None, AT_LEAST_1]
_Steps = Annotated[int, COUNT]
_Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0))]


def _check_finite(kind: Any, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number.")


def _folder(kind: Any, tokens: Sequence[Token]) -> Path:
    """Raises ValueError for "", which a Path takes for the current folder: an unset variable."""
    if not tokens[0].value:
        raise ValueError("an empty name is no folder; the current one is '.'.")
    return Path(tokens[0].value)


#: A folder of this name, as the present one may hold, does not stand in for the model.
MODEL = "shipped:dit"
#: The folder a command fills.
Out = Annotated[Path, Parameter(name=("--out", "-o"), converter=_folder)]
#: What torch takes as a seed; items of a batch take the next ones.
Seed = Annotated[int, Parameter(converter=whole, validator=validators.Number(gte=0, lt=2**63))]
Scale = Annotated[float | None, Parameter(validator=_check_finite)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Split:
    """How the work is split over ranks.

    Parameters
    ----------
    ranks
        Processes to start; by default what the plan asks for, else 1.
    step
        Ranks that share the denoising steps (approximate, error reported).
    cfg
        Ranks that share the two branches of guidance (exact). Neither --step nor --cfg: two ranks
        for cfg where guidance is on and the ranks are even, the rest for step.
    windows
        Sizes of windows: tail, parastep, fixed, adaptive, or a calibration file.
    depth
        Sequential evaluations of the schedule, for tail and calibration files.
    predictor
        How predictions in between are guessed: damped, repeat, own, taylor-1, taylor-2, taylor-3.
    plan
        A plan file, in place of the five options above.
    emulate
        Play all ranks in this process: the same result, not the same time.
    """

    ranks: _Degree = None
    step: _Degree = None
    cfg: _Degree = None
    windows: str | None = None
    depth: _Degree = None
    predictor: str | None = None
    plan: Path | None = None
    emulate: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the pipeline is asked for.

    Parameters
    ----------
    steps
        Denoising steps.
    guidance_scale
        Strength of guidance; by default the pipeline's own.
    seed
        Seed of the first item; with classes, each item takes the next.
    prompt
        Text, for pipelines that take it.
    classes
        Classes of the pictures, as in 0,3,9.
    arguments
        Another argument of the pipeline, as in height=256; values are JSON or text, and @file
        stands for a picture or a .npy array, @@text for text with one @ in front. May be given
        several times.
    denoiser
        Component that denoises, where stretto does not recognise it.
    """

    steps: _Steps = 50
    guidance_scale: Scale = None
    seed: Seed = 0
    prompt: str | None = None
    classes: str | None = None
    arguments: Annotated[tuple[str, ...], Parameter(name="--set", show_default=False)] = ()
    denoiser: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """On what, and for how long.

    Parameters
    ----------
    dtype
        float32, bfloat16 or float16.
    device
        cpu or cuda; by default a GPU per rank where there is one.
    timeout
        Seconds without any progress after which the ranks are given up.
    threads
        Threads of each rank; by default 1, and for a single rank as many as cores are free now.
    """

    dtype: str = "float32"
    device: str | None = None
    timeout: _Seconds = 300.0
    threads: _Degree = None


def plan_of(split: Split) -> Plan | None:
    """The plan of the options, None where the ranks decide. Raises ConfigError, PlanMismatch."""
    names = ("step", "cfg", "windows", "depth", "predictor")
    given = [f"--{name}" for name in names if getattr(split, name) is not None]
    if split.plan is not None:
        if given:
            raise ConfigError(f"--plan {split.plan} already says {', '.join(given)}: give one")
        plan = read_plan(split.plan)
        if plan.kind != "generate":
            raise PlanMismatch(f"{split.plan} is a plan to {plan.kind}; needed is kind: generate")
        _refuse_other_axes(split.plan, plan)
        return plan
    if split.predictor is not None and split.predictor not in PREDICTORS:
        problem = f"--predictor {split.predictor!r} is unknown"
        raise PlanMismatch(_unknown(problem, split.predictor, PREDICTORS))
    if split.windows == "parastep" and split.predictor not in (None, "own"):
        raise PlanMismatch(
            f"--predictor {split.predictor} with --windows parastep\n"
            "  why: the published schedule brings its own predictor\n"
            "  to fix: leave one of them out, or take --windows tail or fixed"
        )
    windows = _windows(split.windows, split.depth)
    if split.step is None and split.cfg is None:
        if given:
            raise PlanMismatch(f"{', '.join(given)} without --step: give the step ranks it is for")
        return None
    predictor = split.predictor or "damped"
    step = Steps(degree=split.step or 1, windows=windows, predictor=predictor)
    return Plan(step=step, cfg=Guidance(degree=split.cfg or 1))


def _refuse_other_axes(file: Path, plan: Plan) -> None:
    """Raise PlanMismatch for axes along which ranks of a generation would repeat one another."""
    idle = [
        f"{name}={option.degree}"
        for name, option in (("dp", plan.dp), ("cp", plan.cp))
        if option.degree > 1
    ]
    if idle:
        raise PlanMismatch(
            f"{file} has {', '.join(idle)}, and a generation is split by step and cfg\n"
            "  why: ranks along other axes would all do the same work\n"
            "  to fix: their ranks to step or cfg; long sequences are split from Python, by "
            "stretto.parallelize on the transformer"
        )


def _windows(text: str | None, depth: int | None) -> Windows:
    if text is None or text == "tail":
        return Tail(depth=depth)
    if text in SCHEDULES:
        if depth is not None:
            raise PlanMismatch(
                f"--depth {depth} with --windows {text}: its depth follows from its own rule; "
                "--depth is for tail and calibration files"
            )
        return SCHEDULES[text]()
    if os.path.isfile(text):  # unlike Path.is_file, False for a name that is too long
        return Calibrated(file=str(Path(text).resolve()), depth=depth)
    problem = f"--windows {text!r} is no schedule and no file"
    raise PlanMismatch(_unknown(problem, text, tuple(SCHEDULES), ", or a calibration file"))


def _unknown(problem: str, name: str, known: tuple[str, ...], besides: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{problem}{hint}\n  to fix: one of {', '.join(known)}{besides}"


def ranks_of(ranks: int | None, plan: Plan | None) -> int:
    """Ranks to start, as asked or as the plan needs. Raises PlanMismatch where they differ."""
    if plan is None:
        return ranks or 1
    if ranks is not None and ranks != plan.world_size:
        step, cfg = plan.step.degree, plan.cfg.degree
        raise PlanMismatch(
            f"step {step} x cfg {cfg} = {plan.world_size} ranks, but --ranks is {ranks}\n"
            "  why: every rank has one place on each axis\n"
            f"  to fix: --ranks {plan.world_size}, or degrees whose product is {ranks}"
        )
    return plan.world_size


def threads_of(asked: int | None, ranks: int) -> int:
    """Threads of each rank: as asked, else 1, or the free cores by the last minute's load for one.

    A thread whose core does other work holds up all of its rank while they spin: on two busy cores
    two threads took 6 to 30 times as long as one (shipped DiT, November 2026).
    """
    if asked is not None:
        check_threads(asked)
        return asked
    if ranks > 1:
        return 1
    return max(1, detect.usable_cores() - round(os.getloadavg()[0]))


def check_comparison(compare: bool, repeats: int | None, ranks: int) -> None:
    """Raise PlanMismatch for a comparison of one rank, ConfigError for repeats of none."""
    if repeats is not None and not compare:
        raise ConfigError(
            f"--repeats {repeats} without --compare: one method generates once\n"
            "  to fix: --compare, or leave it out"
        )
    if compare and ranks < 2:
        raise PlanMismatch(
            f"--compare on {ranks} rank: there is nothing to set beside the sequential run\n"
            "  to fix: --ranks 2 or more (with --emulate they need no cores)"
        )


def call_of(subject: Subject) -> dict[str, Any]:
    """Arguments of the pipeline call. Raises ConfigError."""
    call = _arguments(subject.arguments)
    own = {name: getattr(subject, name) for name in ("guidance_scale", "prompt", "classes")}
    for name, value in own.items():
        place = "class_labels" if name == "classes" else name
        if value is not None and place in call:
            raise ConfigError(f"--{name.replace('_', '-')} and --set {place}=...: give one")
    if subject.guidance_scale is not None:
        call["guidance_scale"] = subject.guidance_scale
    if subject.prompt is not None:
        # Text, whatever it starts with: @ stands for a file in --set alone.
        call["prompt"] = "@" * subject.prompt.startswith("@") + subject.prompt
    if subject.classes is not None:
        call["class_labels"] = _classes(subject.classes)
    return call


def _arguments(texts: Sequence[str]) -> dict[str, Any]:
    call: dict[str, Any] = {}
    for name, value in map(_argument, texts):
        if name in call:
            raise ConfigError(f"--set {name}=... is given twice: give one")
        call[name] = value
    return call


def _argument(text: str) -> tuple[str, Any]:
    """Name and value of a --set. Raises ConfigError."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--set {text!r}: give name=value, as in --set height=256")
    if name in ("output_type", "generator", "num_inference_steps", "return_dict"):
        raise ConfigError(f"--set {name}: stretto sets it; see --seed, --steps and --out")
    return name, _value(value)


def _classes(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"--classes {text!r}: give integers, as 0,3,9") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except ConfigError:
        raise
    except (ValueError, RecursionError):
        return text


def _finite(text: str) -> float:
    """A number of JSON. Raises ConfigError for NaN, which pipelines take for "no guidance"."""
    if not math.isfinite(value := float(text)):
        raise ConfigError(
            f"--set ...{text}: no finite number\n"
            "  to fix: a number between -1.7e308 and 1.7e308, or text in quotes: '\"NaN\"'"
        )
    return value
