"""How blocks circulate in an attention call: the schedules that a `Context` chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.plan.checks import FORBID, check_choice, check_degree, check_flag

KEEPS = ("none", "far", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Ring attention: blocks pass from rank to rank, each rank keeps what rests.

    `circulate`: what moves in backward, keys and values with their gradients, or queries with
    theirs. `gradients`: `owner` sends every partial straight home, `ride` lets a sum travel with
    its block, as published. `prune`: a block travels only as far as somebody sees it.
    `keep`: which received blocks backward finds in memory; `far` and `all` are the same here.
    `grad_wire`: dtype of travelling gradients, that of the inputs or float32.
    Source: Ring Attention, ICLR 2024; BurstAttention for moving queries.
    """

    __pydantic_config__ = FORBID
    kind: Literal["ring"] = "ring"
    circulate: Literal["kv", "q"] = "kv"
    gradients: Literal["owner", "ride"] = "owner"
    prune: bool = True
    keep: Literal["none", "far", "all"] = "none"
    grad_wire: Literal["input", "float32"] = "input"

    def __post_init__(self):
        check_choice("circulate", self.circulate, ("kv", "q"))
        check_choice("gradients", self.gradients, ("owner", "ride"))
        check_flag("prune", self.prune)
        check_choice("keep", self.keep, KEEPS)
        check_choice("grad_wire", self.grad_wire, ("input", "float32"))

    def short(self) -> str:
        words = [] if self.circulate == "kv" else ["moves q"]
        words += ["ride"] * (self.gradients == "ride")
        words += ["unpruned"] * (not self.prune)
        return " ".join(["ring", *words, *_tail(self.keep, self.grad_wire)])


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubleRing:
    """A ring of rings: blocks circle among `inner` ranks, and cross to the next circle once.

    Gradients go to their owner in two stages. Source: LoongTrain, 2024, section 4.
    """

    __pydantic_config__ = FORBID
    kind: Literal["double-ring"] = "double-ring"
    inner: int
    prune: bool = True
    keep: Literal["none", "far", "all"] = "none"
    grad_wire: Literal["input", "float32"] = "input"

    def __post_init__(self):
        check_degree("inner", self.inner)
        check_flag("prune", self.prune)
        check_choice("keep", self.keep, KEEPS)
        check_choice("grad_wire", self.grad_wire, ("input", "float32"))

    def short(self) -> str:
        return " ".join([f"double-ring {self.inner}", *_tail(self.keep, self.grad_wire)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """All keys and values to every rank at once: one exchange, memory of the whole sequence.

    Source: Llama 3 herd of models, 2024, section 3.3.2.
    """

    __pydantic_config__ = FORBID
    kind: Literal["gather"] = "gather"
    keep: Literal["none", "all"] = "none"

    def __post_init__(self):
        check_choice("keep", self.keep, ("none", "all"))

    def short(self) -> str:
        return " ".join(["gather", *_tail(self.keep, "input")])


@dataclass(frozen=True, slots=True, kw_only=True)
class StarTrail:
    """Concentric rings: teams gather queries, keys and values, place keys and values across
    teams, and walk sub-rings of ring / team ranks.

    `circulate`: what moves in backward, queries with their gradients as published, or keys and
    values. `keep`: `far` keeps the placed keys and values for backward, `all` also what the
    sub-ring brought. Source: StarTrail, NeurIPS 2025, section 3.
    """

    __pydantic_config__ = FORBID
    kind: Literal["startrail"] = "startrail"
    circulate: Literal["q", "kv"] = "q"
    keep: Literal["none", "far", "all"] = "none"

    def __post_init__(self):
        check_choice("circulate", self.circulate, ("q", "kv"))
        check_choice("keep", self.keep, KEEPS)

    def short(self) -> str:
        moves = [] if self.circulate == "q" else ["moves kv"]
        return " ".join(["startrail", *moves, *_tail(self.keep, "input")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows by columns: queries gathered over the team, single blocks ring down a column.

    `team_inner`, `ring_inner`: how much of each degree lies within a node; 1 and 1 is a plan of
    one level. `keep`: which received blocks backward finds in memory (`far`: those that crossed
    nodes). `grad_wire`: dtype of travelling gradients, that of the inputs or float32.
    """

    __pydantic_config__ = FORBID
    kind: Literal["tile"] = "tile"
    team_inner: int = 1
    ring_inner: int = 1
    prune: bool = True
    keep: Literal["none", "far", "all"] = "none"
    grad_wire: Literal["input", "float32"] = "input"

    def __post_init__(self):
        check_degree("team_inner", self.team_inner)
        check_degree("ring_inner", self.ring_inner)
        check_flag("prune", self.prune)
        check_choice("keep", self.keep, KEEPS)
        check_choice("grad_wire", self.grad_wire, ("input", "float32"))

    def short(self) -> str:
        inner = (f"team {self.team_inner}", f"ring {self.ring_inner}")
        words = [f"inner {' '.join(inner)}"] * (self.team_inner * self.ring_inner > 1)
        words += ["unpruned"] * (not self.prune)
        return " ".join(["tile", *words, *_tail(self.keep, self.grad_wire)])


Schedule = Ring | DoubleRing | Gather | StarTrail | Tile


def _tail(keep: str, grad_wire: str) -> list[str]:
    words = [] if keep == "none" else [f"keep {keep}"]
    return words + ([] if grad_wire == "input" else [f"{grad_wire} gradients"])
