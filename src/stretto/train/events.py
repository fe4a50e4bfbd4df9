"""What the training loop tells: frozen facts, in the order in which they happen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Began:
    """Ready for step number `step` + 1. `note` says what continues what, "" for a fresh start."""

    step: int
    steps: int
    parameters: int
    tokens_per_step: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step is done. `loss`: mean over the step; `norm`: of all gradients before clipping.

    `seconds` of this rank, `flops` of all ranks together.
    """

    step: int
    loss: float
    norm: float
    rate: float
    tokens: int
    seconds: float
    flops: float


@dataclass(frozen=True, slots=True)
class Validated:
    """Mean loss over held-out samples after step number `step`."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    path: str
    seconds: float


Event = Began | Stepped | Validated | Saved


def line(event: Event) -> dict[str, Any]:
    """The event as a line of metrics.jsonl."""
    return {"event": type(event).__name__.lower(), **asdict(event)}
