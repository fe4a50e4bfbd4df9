"""The noun Plan: one decision, frozen, that can be written down, compared and reviewed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stretto import axes
from stretto.errors import PlanMismatch
from stretto.plan.options import Guidance, Steps


def _option(kind: type) -> BeforeValidator:
    """An integer stands for an option of that degree."""
    return BeforeValidator(lambda v: kind(degree=v) if isinstance(v, int) else v)


class Origin(BaseModel):
    """Where a plan came from: who decided, for what, and on which basis."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: str
    basis: Literal["measured", "simulated", "projected"]
    note: str = ""


class Plan(BaseModel):
    """How one job is split over ranks: an option or a degree per axis.

    `Plan(step=4, cfg=2)` asks for 8 ranks. World size is the product of the degrees.
    Raises PlanMismatch, naming every wrong field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["generate"] = "generate"
    step: Annotated[Steps, _option(Steps)] = Field(default_factory=Steps)
    cfg: Annotated[Guidance, _option(Guidance)] = Field(default_factory=Guidance)
    origin: Origin | None = None

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise PlanMismatch("; ".join(_complaints(error, fields))) from None

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes in mesh order."""
        return axes.ordered({"step": self.step.degree, "cfg": self.cfg.degree})

    @property
    def world_size(self) -> int:
        return axes.world_size(self.sizes)

    def explain(self) -> str:
        """Ranks and axes in words; times need `stretto explain`."""
        lines = [repr(self)]
        lines += [f"  {axis:<6} {size} rank(s)" for axis, size in self.sizes.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        parts = [o.short() for o in (self.step, self.cfg) if o.degree > 1] or ["one rank"]
        return f"{self.kind}: {' '.join(parts)} = {self.world_size} ranks"

    def __str__(self) -> str:
        return repr(self)


def _complaints(error: ValidationError, fields: dict) -> list[str]:
    """One sentence per wrong field; of a union only the branch whose kind was asked for."""
    asked = _kinds(fields)
    lines, known = [], []
    for item in error.errors(include_url=False):
        branch = [part for part in item["loc"] if isinstance(part, str) and part[:1].isupper()]
        where = ".".join(str(part) for part in item["loc"] if part not in branch)
        if item["type"] == "literal_error" and branch:
            known.append(item["ctx"]["expected"])
        elif not branch or not asked or branch[0].lower() in asked:
            lines.append(f"{where or 'plan'}: {_reason(item)}")
    return lines or [f"kind {', '.join(sorted(asked))!r} is unknown; known are {', '.join(known)}"]


def _reason(item: Any) -> str:
    cause = item.get("ctx", {}).get("error")
    return str(cause) if cause else f"{item['msg']} (got {item['input']!r})"


def _kinds(fields: object) -> set[str]:
    if not isinstance(fields, dict):
        return set()
    kinds = {str(fields["kind"])} if "kind" in fields else set()
    return kinds.union(*(_kinds(value) for value in fields.values()))
