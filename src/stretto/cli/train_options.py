"""What `stretto train` is asked for: its options in groups, and the recipe and plan they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from stretto.cli.whole import AT_LEAST_0, AT_LEAST_1, whole
from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import Context, Data

if TYPE_CHECKING:
    from stretto.train.recipe import Recipe

_Degree = Annotated[int | None, AT_LEAST_1]
_Positive = Annotated[int, AT_LEAST_1]
_Count = Annotated[int, AT_LEAST_0]
_PLANNED = ("cp", "fsdp", "micro_batch", "cluster")
_Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Split:
    """How the work is split over ranks.

    Parameters
    ----------
    ranks
        Processes to start; by default what the plan or --fsdp asks for, else 1.
    cp
        How ranks share each sequence, with --ranks: auto, ring, ulysses, usp(2), startrail(2),
        tile(2), kv-allgather, pass-q, double-ring(2).
    fsdp
        Ranks, or groups of ranks, that take sequences of their own. Without --cp: all ranks.
    micro_batch
        Sequences that a rank works on at once.
    cluster
        File or preset whose rates decide --cp auto; by default CPU ranks of one machine.
    plan
        A plan file, in place of the options above.
    """

    ranks: _Degree = None
    cp: str | None = None
    fsdp: _Degree = None
    micro_batch: _Degree = None
    cluster: str | None = None
    plan: Path | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Work:
    """What is learnt, and for how long.

    Parameters
    ----------
    data
        A file or folder of text; by default the sources of Python's standard library.
    tokens
        Tokens of a sequence; by default what the preset is made for.
    sequences
        Sequences of a step, on all ranks together.
    steps
        Steps in all, those before --resume included.
    seed
        Seed of weights and of the order of the data.
    window
        Keys that a token sees, itself included, of a gpt preset; by default all before it.
    documents
        Whether a token sees its own file only (apart) or all of its sequence before it (joined);
        by default apart, of a transformers configuration joined.
    recompute
        Keep less of the forward pass; attention itself is never run twice.
    """

    data: str | None = None
    tokens: _Degree = None
    sequences: _Positive = 8
    steps: _Positive = 100
    seed: Annotated[int, Parameter(converter=whole)] = 0
    window: _Degree = None
    documents: Literal["apart", "joined"] | None = None
    recompute: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Down:
    """How weights follow gradients.

    Parameters
    ----------
    optimizer
        adamw or sgd.
    rate
        Learning rate after warm-up; it falls along a cosine to a tenth.
    warmup
        Steps in which the rate rises.
    weight_decay
        Pull of matrices towards zero.
    clip
        Largest norm of all gradients together, 0 for no clipping.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: float = 1e-3
    warmup: _Count = 20
    weight_decay: float = 0.1
    clip: float = 1.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """On what, and for how long.

    Parameters
    ----------
    dtype
        float32, bfloat16 (float32 weights, bfloat16 arithmetic) or float64.
    device
        cpu or cuda; by default a GPU per rank where there is one.
    timeout
        Seconds without any progress after which the ranks are given up.
    threads
        Threads of each rank; by default 1.
    """

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: str | None = None
    timeout: _Seconds = 300.0
    threads: _Positive = 1


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Log:
    """What is written on the way.

    Parameters
    ----------
    validate_every
        Steps between two looks at held-out data; 0: at the end.
    save_every
        Steps between two checkpoints; 0: at the end.
    resume
        Continue after the newest complete checkpoint in --out.
    """

    validate_every: _Count = 0
    save_every: _Count = 0
    resume: bool = False


def recipe_of(model: str, work: Work, down: Down, dtype: str) -> Recipe:
    """The recipe of the options. Raises ConfigError."""
    from stretto.train.presets import PRESETS
    from stretto.train.recipe import Descent, Recipe

    preset = PRESETS.get(model)
    descent = Descent(
        optimizer=down.optimizer,
        rate=down.rate,
        warmup=min(down.warmup, work.steps),
        weight_decay=down.weight_decay,
        clip=down.clip,
    )
    return Recipe(
        model=model,
        data=work.data,
        tokens=work.tokens or (preset.tokens if preset else 1024),
        sequences=work.sequences,
        steps=work.steps,
        seed=work.seed,
        dtype=dtype,
        window=work.window,
        documents=work.documents,
        recompute=work.recompute,
        descent=descent,
    )


def plan_of(split: Split, recipe: Recipe) -> Plan:
    """The plan of the options, checked against its ranks. Raises ConfigError, PlanMismatch."""
    if split.plan is not None:
        given = [f"--{n}" for n in _PLANNED if getattr(split, n) is not None]
        if given:
            raise ConfigError(f"--plan {split.plan} already says {', '.join(given)}: give one")
        plan = read_plan(split.plan)
        if plan.kind != "train":
            raise PlanMismatch(f"{split.plan} is a plan to {plan.kind}; needed is kind: train")
    else:
        plan = _plan(split, recipe)
    if split.ranks is not None and split.ranks != plan.world_size:
        raise PlanMismatch(
            f"{plan!r}, but --ranks is {split.ranks}\n"
            "  why: every rank has one place in the plan\n"
            f"  to fix: --ranks {plan.world_size}, or degrees whose product is {split.ranks}"
        )
    return plan


def _degrees(split: Split) -> tuple[int, int]:
    """Ranks that take sequences of their own, and ranks that share one."""
    ranks = split.ranks or split.fsdp or 1
    if split.cp is None:
        return split.fsdp or ranks, 1
    fsdp = split.fsdp or 1
    if ranks % fsdp:
        raise PlanMismatch(
            f"--fsdp {fsdp} does not divide --ranks {ranks}: groups that share a sequence are of "
            "equal size"
        )
    return fsdp, ranks // fsdp


def _check_split(split: Split, fsdp: int, shared: int) -> None:
    """Raise ConfigError for options that would change nothing."""
    if split.cluster is not None and split.cp != "auto":
        raise ConfigError(
            f"--cluster {split.cluster} without --cp auto: its rates decide nothing else\n"
            "  to fix: --cp auto, or leave it out"
        )
    if split.cp not in (None, "auto") and shared == 1 and split.ranks != 1:
        given = [f"--fsdp {split.fsdp}"] * bool(split.fsdp)
        given.append("no --ranks" if split.ranks is None else f"--ranks {split.ranks}")
        raise ConfigError(
            f"--cp {split.cp} with {' and '.join(given)}: one rank to a sequence, and nobody to "
            "share it with\n"
            f"  to fix: --ranks {2 * fsdp} or more; without --cp every rank takes sequences of its "
            "own"
        )


def _plan(split: Split, recipe: Recipe) -> Plan:
    fsdp, shared = _degrees(split)
    _check_split(split, fsdp, shared)
    context, origin = Context(), None
    if split.cp == "auto" and shared > 1:
        from stretto.train.choice import best_context

        micro = split.micro_batch or 1
        context, origin = best_context(recipe, shared, fsdp, split.cluster, micro_batch=micro)
    elif split.cp is not None and split.cp != "auto":
        context = Context.named(split.cp, shared)
    data = Data(shard=fsdp, micro_batch=split.micro_batch or 1)
    return Plan(kind="train", dp=data, cp=context, origin=origin)
