"""The option of each axis: frozen dataclasses, tagged by `kind` where there is a choice.

Standard library only, so that code which does the work can use them where pydantic is absent.
Every axis option has `degree`, `short()` for people and `wire(case)`, the exact bytes it sends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from stretto.errors import PlanMismatch
from stretto.plan.checks import (
    FORBID,
    check_choice,
    check_count,
    check_degree,
    check_flag,
    check_shares,
)
from stretto.plan.context import (
    AttentionCase,
    Context,
    DoubleRing,
    Gather,
    Ring,
    Schedule,
    StarTrail,
    Tile,
)
from stretto.plan.traffic import Traffic

__all__ = [
    "Adaptive",
    "AttentionCase",
    "Calibrated",
    "Context",
    "Data",
    "DataCase",
    "DoubleRing",
    "Fixed",
    "Gather",
    "Guidance",
    "GuidanceCase",
    "Listed",
    "Parastep",
    "Ring",
    "Schedule",
    "StarTrail",
    "Steps",
    "StepsCase",
    "Tail",
    "Tile",
    "Windows",
]

PREDICTORS = ("damped", "repeat", "own", "taylor-1", "taylor-2", "taylor-3")
WALKS = ("auto", "replay", "leader")
SPLITS = ("auto", "batch", "calls")
REDUCE_DTYPES = ("input", "float32")

#: Fixed header in front of every window message, bytes.
HEADER_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Parastep:
    """The published schedule: `warmup` exact steps first, then windows of `degree`.

    `warmup` None is min(5, max(1, steps // 4)). Implies the predictor `own`. Raises PlanMismatch.
    Source: ParaStep, NeurIPS 2025, section 3.
    """

    __pydantic_config__ = FORBID
    kind: Literal["parastep"] = "parastep"
    warmup: int | None = None

    def __post_init__(self):
        if self.warmup is not None:
            check_count("parastep: warmup", self.warmup)

    def short(self) -> str:
        return "parastep" if self.warmup is None else f"parastep w{self.warmup}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Small windows where little noise or little signal is left, chosen from the noise grid alone.

    A dynamic programme of least expected error; the name is from its first form, which put exact
    steps last.
    `depth` is the number of sequential denoiser evaluations; None is that of `Parastep()`, so
    that both can be compared at equal cost. Needs no calibration. Raises PlanMismatch.
    """

    __pydantic_config__ = FORBID
    kind: Literal["tail"] = "tail"
    depth: int | None = None

    def __post_init__(self):
        if self.depth is not None:
            check_count("tail: depth", self.depth)

    def short(self) -> str:
        return "tail" if self.depth is None else f"tail d{self.depth}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """`warmup` exact steps (at least 1), windows of `degree`, `cooldown` exact steps (0 or more).

    Raises PlanMismatch.
    """

    __pydantic_config__ = FORBID
    kind: Literal["fixed"] = "fixed"
    warmup: int = 1
    cooldown: int = 0

    def __post_init__(self):
        check_count("fixed: warmup", self.warmup)
        check_count("fixed: cooldown", self.cooldown, least=0)

    def short(self) -> str:
        return f"fixed w{self.warmup} c{self.cooldown}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Window sizes written out; they sum to the number of steps and start with 1.

    `damping[h-1]` in [0, 1] is the damping of the prediction h steps ahead, empty to fit it online.
    `grid`: noise fractions s_0 .. s_N that the sizes were made for, empty for any grid. Raises
    PlanMismatch for sizes below 1 and for numbers outside [0, 1].
    """

    __pydantic_config__ = FORBID
    kind: Literal["listed"] = "listed"
    sizes: tuple[int, ...]
    damping: tuple[float, ...] = ()
    grid: tuple[float, ...] = ()

    def __post_init__(self):
        if not isinstance(self.sizes, tuple | list) or not self.sizes:
            raise PlanMismatch(f"listed: sizes={self.sizes!r}: expected window sizes, as in (1, 4)")
        for place, size in enumerate(self.sizes):
            check_count(f"listed: sizes[{place}]", size)
        check_shares("listed: damping", self.damping)
        check_shares("listed: grid", self.grid)

    def short(self) -> str:
        return "listed " + " ".join(map(str, self.sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Windows and damping from a file written by `stretto generate calibrate`.

    `depth` None takes the file's entry for the depth of `Parastep()`. Raises PlanMismatch.
    """

    __pydantic_config__ = FORBID
    kind: Literal["calibrated"] = "calibrated"
    file: str
    depth: int | None = None

    def __post_init__(self):
        if not isinstance(self.file, str) or not self.file:
            raise PlanMismatch(f"calibrated: file={self.file!r}: expected the path of a file")
        if self.depth is not None:
            check_count("calibrated: depth", self.depth)

    def short(self) -> str:
        return "calibrated" if self.depth is None else f"calibrated d{self.depth}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Windows that grow while the last measured guess error stays under `tolerance`.

    `tolerance` is rms(true latent - guessed latent) / rms(true latent). Never a default: a
    tolerance does not transfer between noise grids. Raises PlanMismatch.
    """

    __pydantic_config__ = FORBID
    kind: Literal["adaptive"] = "adaptive"
    tolerance: float = 0.02

    def __post_init__(self):
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance < math.inf:
            raise PlanMismatch(
                f"adaptive: tolerance={self.tolerance!r}: expected a finite number, at least 0"
            )

    def short(self) -> str:
        return f"adaptive {self.tolerance:g}"


Windows = Parastep | Tail | Fixed | Listed | Calibrated | Adaptive


@dataclass(frozen=True, slots=True)
class StepsCase:
    """What the bytes of step parallelism depend on.

    `windows`: sizes in order; `rank`: position on the step axis; `guided_bytes`: one guided
    prediction; `raw_bytes`: one denoiser output of the whole batch; `chunks`: how many ranks share
    an exact step (1 = all compute all of it).
    """

    windows: tuple[int, ...]
    rank: int
    guided_bytes: int
    raw_bytes: int = 0
    chunks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Denoising steps in parallel: each window of W steps is evaluated by W ranks at once.

    `predictor`: how a rank guesses the predictions it does not compute. `walk`: `replay` (every
    rank takes every true step), `leader` (rank 0 does, for pipelines that edit latents between
    steps), `auto` finds out. `exact_split`: ranks share the batch of a window of one step.
    """

    __pydantic_config__ = FORBID
    degree: int = 1
    windows: Windows = field(default_factory=Tail)
    predictor: str = "damped"
    walk: str = "auto"
    exact_split: bool = True

    def __post_init__(self):
        check_degree("step", self.degree)
        check_choice("predictor", self.predictor, PREDICTORS)
        check_choice("walk", self.walk, WALKS)
        check_flag("exact_split", self.exact_split)
        if not isinstance(self.windows, Windows):
            raise PlanMismatch(
                f"windows {self.windows!r} is a {type(self.windows).__name__}; expected "
                "Parastep(), Tail(), Fixed(), Listed(sizes=...), Calibrated(file=...) or Adaptive()"
            )

    def short(self) -> str:
        if isinstance(self.windows, Calibrated):
            # The file says how predictions are guessed.
            return f"step{self.degree}({self.windows.short()})"
        return f"step{self.degree}({self.windows.short()}, {self.guesses})"

    @property
    def guesses(self) -> str:
        """The predictor in force: the published schedule brings its own."""
        return "own" if isinstance(self.windows, Parastep) else self.predictor

    def wire(self, case: StepsCase) -> Traffic:
        """Bytes sent in the replay walk, headers included, and 8 bytes a step for the report."""
        others = self.degree - 1
        traffic = Traffic()
        for size in case.windows:
            if size > 1 and case.rank < size:
                verb = "all_gather" if size == self.degree else "broadcast"
                message = HEADER_BYTES + case.guided_bytes
                traffic.add("window", verb, "step", others * message)
            elif size == 1 and case.chunks > 1 and case.rank < case.chunks:
                verb = "all_gather" if case.chunks == self.degree else "broadcast"
                traffic.add("exact", verb, "step", others * case.raw_bytes // case.chunks)
        traffic.add("report", "all_gather", "step", others * 8 * sum(case.windows))
        return traffic


@dataclass(frozen=True, slots=True)
class GuidanceCase:
    """What the bytes of guidance parallelism depend on.

    `evaluations`: denoiser steps this rank takes part in; `calls`: denoiser calls per step;
    `rank`: position on the cfg axis; `raw_bytes`: one denoiser output; `guided_bytes`: one guided
    prediction; `split`: batch or calls. `guesses`: published guesses (predictor `own`) of this
    rank's step position, each recombined from branches that only the leader holds.
    """

    evaluations: int
    calls: int
    rank: int
    raw_bytes: int
    guided_bytes: int
    split: str
    guesses: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Classifier-free guidance in parallel, exact: its branches run on `degree` ranks.

    `split`: `batch` cuts the denoiser's batch into equal chunks, `calls` gives every rank whole
    denoiser calls (pipelines that call once per branch), `auto` takes what the shapes allow.
    """

    __pydantic_config__ = FORBID
    degree: int = 1
    split: str = "auto"

    def __post_init__(self):
        check_degree("cfg", self.degree)
        check_choice("split", self.split, SPLITS)

    def short(self) -> str:
        return f"cfg{self.degree}" + ("" if self.split == "auto" else f"({self.split})")

    def wire(self, case: GuidanceCase) -> Traffic:
        """Bytes sent: chunks to the group, or outputs to the leader and its guided result back."""
        traffic = Traffic()
        others = self.degree - 1
        if case.split == "batch":
            sent = others * case.raw_bytes // self.degree
            traffic.add("guidance", "all_gather", "cfg", case.evaluations * case.calls * sent)
            return traffic
        own = len(range(case.rank, case.calls, self.degree))
        if case.rank:
            traffic.add("guidance", "permute", "cfg", case.evaluations * own * case.raw_bytes)
        elif others:
            sent = (case.evaluations + case.guesses) * others * case.guided_bytes
            traffic.add("guidance", "broadcast", "cfg", sent)
        return traffic


@dataclass(frozen=True, slots=True)
class DataCase:
    """What the bytes of sharded training depend on, for one optimizer step.

    `parameters`: elements in all; `gathers`: how often a rank assembles them (forward and backward
    of every micro-batch).
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    gathers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Batches over groups of ranks: `shard` ranks share weights (fully sharded), groups of them
    hold `replicate` copies.

    Copies (HSDP, `replicate` > 1) can be written and counted; the trainer keeps weights once and
    refuses them (PlanMismatch), naming the plan of as many shards to use instead.

    `micro_batch`: sequences per forward pass and rank group; `reduce_dtype`: in which gradients
    travel, `input` is that of the parameters.
    """

    __pydantic_config__ = FORBID
    replicate: int = 1
    shard: int = 1
    micro_batch: int = 1
    reduce_dtype: str = "input"

    def __post_init__(self):
        check_degree("replicate", self.replicate)
        check_degree("shard", self.shard)
        check_degree("micro_batch", self.micro_batch)
        check_choice("reduce_dtype", self.reduce_dtype, REDUCE_DTYPES)

    @property
    def degree(self) -> int:
        """Ranks on the `fsdp` axis: copies times shards."""
        return self.replicate * self.shard

    def short(self) -> str:
        copies = f"replicate{self.replicate} " if self.replicate > 1 else ""
        return f"{copies}fsdp{self.shard}"

    def wire(self, case: DataCase) -> Traffic:
        """Bytes of one step of fully sharded training, counted as ring collectives send them."""
        others, traffic = self.shard - 1, Traffic()
        share = -(-case.parameters // self.shard)
        gathers = others * share * case.parameter_bytes * case.gathers
        traffic.add("weights", "all_gather", "fsdp", gathers)
        traffic.add("gradients", "reduce_scatter", "fsdp", others * share * case.gradient_bytes)
        copies = 2 * (self.replicate - 1) * share * case.gradient_bytes // self.replicate
        traffic.add("gradients", "all_reduce", "fsdp", copies)
        return traffic
