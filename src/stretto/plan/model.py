"""The noun Plan: one decision, frozen, that can be written down, compared and reviewed."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
)

from stretto import axes
from stretto.errors import PlanMismatch
from stretto.plan.options import Context, Data, Guidance, Schedule, Steps, Windows

Place = tuple[str | int, ...]


#: Branches of the unions, by the name that pydantic gives them, and their kinds.
_KINDS: dict[str, str] = {
    branch.__name__: typing.get_args(typing.get_type_hints(branch)["kind"])[0]
    for union in (Windows, Schedule)
    for branch in typing.get_args(union)
}


def _option(of_degree: Callable[[int], object]) -> BeforeValidator:
    """An integer stands for an option of that degree."""
    return BeforeValidator(lambda v: of_degree(v) if isinstance(v, int) else v)


class Origin(BaseModel):
    """Where a plan came from: who decided, for what, and on which basis."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: str
    basis: Literal["measured", "simulated", "projected"]
    note: str = ""


class Placement(BaseModel):
    """In which order axes span the ranks: neighbours on the last one sit side by side.

    `order`: axes, outermost first; those that it does not name come before, in mesh order. Shards
    follow logical positions, so an order changes who is whose neighbour and no result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    order: tuple[str, ...]

    @field_validator("order")
    @classmethod
    def _known(cls, order: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [axis for axis in order if axis not in axes.ORDER]
        if unknown or len(set(order)) < len(order):
            raise ValueError(
                f"order {', '.join(order)}: each of {', '.join(axes.ORDER)} at most once"
            )
        return order


class Plan(BaseModel):
    """How one job is split over ranks: an option or a degree per axis.

    `Plan(step=4, cfg=2)` asks for 8 ranks, `Plan(kind="train", dp=2, cp=Context(ring=4))` too.
    World size is the product of the degrees. Raises PlanMismatch, naming every wrong field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["generate", "train"] = "generate"
    dp: Annotated[Data, _option(lambda n: Data(shard=n))] = Field(default_factory=Data)
    cp: Annotated[Context, _option(lambda n: Context(ring=n))] = Field(default_factory=Context)
    step: Annotated[Steps, _option(lambda n: Steps(degree=n))] = Field(default_factory=Steps)
    cfg: Annotated[Guidance, _option(lambda n: Guidance(degree=n))] = Field(
        default_factory=Guidance
    )
    placement: Placement | None = None
    origin: Origin | None = None

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise PlanMismatch("; ".join(_complaints(error, fields))) from None

    @model_serializer(mode="wrap")
    def _without_idle_axes(self, write: Callable[[Plan], dict]) -> dict:
        """Fields to write; `dp` and `cp` say nothing where they are as nobody set them."""
        idle = {"dp": Data(), "cp": Context()}
        return {k: v for k, v in write(self).items() if getattr(self, k) != idle.get(k, ...)}

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes in the order of the mesh, that of `placement` where there is one."""
        own = {"step": self.step.degree, "fsdp": self.dp.degree, "cfg": self.cfg.degree}
        sizes = axes.ordered(own | self.cp.sizes)
        moved = self.placement.order if self.placement else ()
        before = {axis: n for axis, n in sizes.items() if axis not in moved}
        return before | {axis: sizes[axis] for axis in moved}

    @property
    def world_size(self) -> int:
        return axes.world_size(self.sizes)

    def explain(self) -> str:
        """Ranks and axes in words, and nothing else: all that a plan says by itself.

        No phases, bytes, hops or seconds, which are of a job and a cluster: `stretto.explain(plan)`
        gives a training plan's phases in blocks, with a workload its exact bytes, with both its
        seconds.
        """
        lines = [repr(self)]
        shown = {axis: n for axis, n in self.sizes.items() if n > 1}
        width = max(6, *map(len, shown), 0)
        lines += [f"  {axis:<{width}} {n} rank(s)" for axis, n in shown.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        options = (self.step, self.dp, self.cfg, self.cp)
        parts = [o.short() for o in options if o.degree > 1]
        split = f"{' '.join(parts)} = {self.world_size} ranks" if parts else "one rank"
        order = f", order {' '.join(self.placement.order)}" if self.placement else ""
        return f"{self.kind}: {split}{order}"

    def __str__(self) -> str:
        return repr(self)


def _complaints(error: ValidationError, fields: dict) -> list[str]:
    """One sentence per wrong field; of a union only the branch whose kind was asked for."""
    items = [(*_parted(item["loc"]), item) for item in error.errors(include_url=False)]
    unions: dict[Place, list[str]] = {}
    for place, kind, _, _ in items:
        if kind and kind not in unions.setdefault(place, []):
            unions[place].append(kind)
    lines = []
    for place, kinds in unions.items():
        value = _value_at(fields, place)
        asked = _kind_of(value)
        if asked not in kinds:
            seen = f"kind {asked!r} is unknown" if asked else f"no kind in {value!r}"
            lines.append(f"{_path(place)}: {seen}; known are {', '.join(kinds)}")
    for place, kind, rest, item in items:
        if kind is None or kind == _kind_of(_value_at(fields, place)):
            lines.append(f"{_path((*place, *rest)) or 'plan'}: {_reason(item)}")
    return lines


def _parted(place: Place) -> tuple[Place, str | None, Place]:
    """A place up to a union, the kind of the branch that pydantic tried there, and the rest."""
    for index, part in enumerate(place):
        if isinstance(part, str) and part[:1].isupper():
            return place[:index], _KINDS.get(part, part.lower()), place[index + 1 :]
    return place, None, ()


def _value_at(fields: Any, place: Place) -> Any:
    for part in place:
        fields = fields.get(part) if isinstance(fields, dict) else None
    return fields


def _kind_of(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else None
    return None if kind is None else str(kind)


def _path(place: Place) -> str:
    return ".".join(map(str, place))


def _reason(item: Any) -> str:
    cause = item.get("ctx", {}).get("error")
    return str(cause) if cause else f"{item['msg']} (got {item['input']!r})"
