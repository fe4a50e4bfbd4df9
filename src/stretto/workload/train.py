"""A training step as arithmetic: the model, its sequences, and what must be held in memory."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stretto import documents
from stretto.workload.arch import Arch, from_config, read_arch

SCHEMA = "workload/1"
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
Dtype = Literal["bf16", "fp16", "fp32", "fp64"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Frozen):
    """What a plan must keep: a share of each device's memory."""

    memory_fraction: float = Field(0.92, gt=0, le=1)


class Training(_Frozen):
    """A training step: `sequences` of `tokens` tokens through a model. Counts, no seconds.

    `model`: a preset or a path, which `arch` describes. `documents`: lengths that sum to `tokens`
    where sequences are packed. `state_bytes` per parameter: master weight, gradient and two
    moments of AdamW, each in float32. `efficiency`: the part of the device's matmul rate that
    layers outside attention reach, one half where not measured. `recompute`: layers keep only what
    attention needs, and their inputs.
    """

    kind: Literal["train"] = "train"
    model: str
    arch: Arch
    tokens: int = Field(ge=1)
    sequences: int = Field(1, ge=1)
    dtype: Dtype = "bf16"
    window: int | None = Field(None, ge=1)
    documents: tuple[int, ...] | None = None
    state_bytes: int = Field(16, ge=0)
    efficiency: float = Field(0.5, gt=0, le=1)
    recompute: bool = True
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if min(self.documents or (), default=0) < 0:
            raise ValueError(f"documents: {min(self.documents or ())} tokens in one of them")
        if self.documents is not None and sum(self.documents) != self.tokens:
            raise ValueError(
                f"documents: their lengths sum to {sum(self.documents)}, a sequence has "
                f"{self.tokens} tokens"
            )
        return self

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def scalar_bytes(self) -> int:
        """Of a log-sum-exp: float32, and float64 beside float64."""
        return 8 if self.dtype == "fp64" else 4

    @property
    def seen(self) -> int | None:
        """Keys that a query sees at most, of the job or of the model; None for all."""
        found = [each for each in (self.window, self.arch.window) if each is not None]
        return min(found, default=None)

    @classmethod
    def of(
        cls, model: str | os.PathLike[str] | Arch | dict, tokens: int, **fields: Any
    ) -> Training:
        """A step of a preset, a config.json, its content or an Arch. Raises ConfigError."""
        if isinstance(model, dict):
            arch = from_config(model)
        else:
            arch = model if isinstance(model, Arch) else read_arch(model)
        name = arch.name if isinstance(model, (Arch, dict)) else str(model)
        return documents.make(cls, {"model": name, "arch": arch, "tokens": tokens, **fields})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `workload/1`; an existing file is replaced at once or not at all."""
        documents.write(self, path, SCHEMA)
