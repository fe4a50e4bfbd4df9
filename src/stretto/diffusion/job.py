"""A generation job and what comes of it: plain data that goes to every rank and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stretto.diffusion.output import Media
from stretto.plan.model import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to generate. `plan` None means the automatic one for `ranks`.

    `call`: arguments of the pipeline call; text "@file" stands for a picture or a .npy array,
    "@@text" for text that starts with @.
    `steps`, `seed`: item i of a batch has the seed `seed` + i where the pipeline takes a batch of
    class labels, else the whole call has one generator. `repeats` 0: no comparison.
    """

    source: str
    ranks: int
    plan: Plan | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 50
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    denoiser: str | None = None
    emulated: bool = False
    repeats: int = 0
    timeout_s: float = 300.0


@dataclass(slots=True, kw_only=True)
class Run:
    """What one method did on this rank. `seconds` are of this rank, from call to result.

    `report` is `Report.as_dict()`, None where no plan was in force (`plan` None); there `calls`
    counts denoiser calls. `media`, on rank 0 only, is that of the first repeat.
    """

    who: str
    plan: Plan | None
    steps: int
    seconds: list[float] = field(default_factory=list)
    report: dict | None = None
    media: Media | None = None
    calls: int = 0

    @property
    def plan_text(self) -> str:
        return repr(self.plan) if self.plan else "one rank, untouched pipeline"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Everything one rank returns; a comparison adds `costs` and `floor` (see there) on rank 0."""

    plan: Plan
    device: str
    runs: list[Run]
    costs: dict[tuple[int, int], float] = field(default_factory=dict)
    floor: Media | None = None
