"""The noun Workload: the job as arithmetic. A generation of a diffusion model, or training."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stretto import documents
from stretto.errors import ConfigError
from stretto.quantities import Bytes, Flops, Memory, Seconds
from stretto.workload.arch import Arch
from stretto.workload.train import Training

SCHEMA = "workload/1"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Evaluation(_Frozen):
    """One step's denoiser evaluation with all branches of guidance: `seconds`, or `flops`.

    `seconds` are those of one device of kind `device` (of any device where that is not given);
    `flops` run at `efficiency` times the device's rate in `dtype`, one half where not measured.
    `rows`: the batch of one denoiser call, None for 2 with batched guidance and else 1.
    `half_batch_cost`: time of half the batch over that of all of it, near 0.5, and 1
    where the device is bound by launches. `memory_bytes`: what a rank needs to hold, None where
    not known.
    """

    seconds: Seconds | None = Field(None, gt=0)
    flops: Flops | None = Field(None, gt=0)
    dtype: str = "bf16"
    efficiency: float = Field(0.5, gt=0, le=1)
    device: str | None = None
    rows: int | None = Field(None, ge=1)
    half_batch_cost: float = Field(0.5, gt=0, le=1)
    memory_bytes: Memory | None = None

    @model_validator(mode="after")
    def _one_measure(self) -> Evaluation:
        if (self.seconds is None) == (self.flops is None):
            raise ValueError("give either `seconds` or `flops` of one evaluation")
        return self


class Limits(_Frozen):
    """What a plan must keep: a share of each device's memory, and sequential evaluations at least.

    `least_depth`: no plan with fewer sequential evaluations than this is proposed.
    """

    memory_fraction: float = Field(0.92, gt=0, le=1)
    least_depth: int = Field(1, ge=1)


class Workload(_Frozen):
    """A job and its model as arithmetic; `kind` says which job. Seconds and bytes.

    `guidance`: "batch" where both branches are one denoiser batch, "calls" where each is a call
    of its own, "none" without. `guided_bytes`: one guided prediction of all items; `raw_bytes`:
    one denoiser call's output, None for what the guidance implies. `step_seconds`: one scheduler
    step. `noise`: the N + 1 noise fractions, None for the flow-matching grid of `shift`.
    """

    kind: Literal["denoise"] = "denoise"
    steps: int = Field(ge=1)
    guidance: Literal["none", "batch", "calls"] = "batch"
    evaluation: Evaluation
    guided_bytes: Bytes = Field(ge=0)
    raw_bytes: Bytes | None = Field(None, ge=0)
    encode_seconds: Seconds = 0.0
    decode_seconds: Seconds = 0.0
    step_seconds: Seconds = 0.0
    noise: tuple[float, ...] | None = None
    shift: float = Field(1.0, gt=0)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        if self.noise is not None and len(self.noise) != self.steps + 1:
            raise ValueError(
                f"noise: {len(self.noise)} fractions for {self.steps} steps, "
                f"{self.steps + 1} are needed: one per step and the final one"
            )
        if self.guidance == "batch" and self.evaluation.rows and self.evaluation.rows % 2:
            raise ValueError(
                f"evaluation.rows: {self.evaluation.rows} is odd, but batched guidance has two "
                "branches for each item"
            )
        return self

    @classmethod
    def denoise(
        cls,
        steps: int,
        *,
        guidance: Literal["none", "batch", "calls"] = "batch",
        evaluation_seconds: float | str | None = None,
        evaluation_flops: float | str | None = None,
        half_batch_cost: float = 0.5,
        guided_bytes: int | str = 0,
        **fields: Any,
    ) -> Workload:
        """One generation of `steps` denoising steps. Quantities may be text with a unit.

        Further fields are those of Workload (raw_bytes, encode_seconds, decode_seconds, noise,
        shift, limits ...) and of Evaluation (dtype, device, rows, memory_bytes, efficiency).
        Raises ConfigError.
        """
        inner = {name: fields.pop(name) for name in Evaluation.model_fields if name in fields}
        inner |= {"half_batch_cost": half_batch_cost}
        inner |= {"seconds": evaluation_seconds, "flops": evaluation_flops}
        evaluation = {name: value for name, value in inner.items() if value is not None}
        mine = {"steps": steps, "guidance": guidance, "guided_bytes": guided_bytes}
        return documents.make(cls, {**mine, "evaluation": evaluation, **fields})

    @staticmethod
    def train(model: str | os.PathLike[str] | Arch | dict, tokens: int, **fields: Any) -> Training:
        """A training step on sequences of `tokens` tokens.

        `model`: a preset, a config.json or its folder, its content, or an Arch. Further fields are
        those of Training (sequences, dtype, window, documents, limits ...). Raises ConfigError.
        """
        return Training.of(model, tokens, **fields)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Workload:
        """A generation from a file `workload/1`. Raises ConfigError naming file, line and field."""
        return documents.load(cls, documents.read(path, SCHEMA))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `workload/1`; an existing file is replaced at once or not at all."""
        documents.write(self, path, SCHEMA)


def read_workload(path: str | os.PathLike[str]) -> Workload | Training:
    """A workload of any kind from a file. Raises ConfigError naming file, line and field."""
    document = documents.read(path, SCHEMA)
    kinds = {"denoise": Workload, "train": Training}
    kind = document.fields.get("kind", "denoise")
    if kind not in kinds:
        raise ConfigError(f"{path}: kind {kind!r} is unknown; known are {', '.join(kinds)}")
    return documents.load(kinds[kind], document)
