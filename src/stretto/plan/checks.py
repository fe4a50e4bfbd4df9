"""What every option checks of its fields: degrees count ranks, words come from a list.

And what whoever takes a plan for a training checks of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from stretto.errors import PlanMismatch

if TYPE_CHECKING:
    from stretto.plan.model import Plan

#: For pydantic: a field that an option does not have is an error.
FORBID = {"extra": "forbid"}


def check_degree(axis: str, degree: int) -> None:
    """Raise PlanMismatch unless `degree` is a whole number and at least 1."""
    if not is_whole(degree):
        raise PlanMismatch(f"{axis}={degree!r}: a degree counts ranks, as an int")
    if degree < 1:
        raise PlanMismatch(f"{axis}={degree}: a degree counts ranks and is at least 1")


def check_count(what: str, value: object, least: int = 1) -> None:
    """Raise PlanMismatch unless `value` is a whole number and at least `least`."""
    if not is_whole(value) or value < least:
        raise PlanMismatch(f"{what}={value!r}: expected a whole number, at least {least}")


def check_shares(what: str, values: object) -> None:
    """Raise PlanMismatch, with its place, for a number outside [0, 1]; NaN is outside too."""
    if not isinstance(values, tuple | list):
        raise PlanMismatch(f"{what}={values!r} is a {type(values).__name__}; expected a tuple")
    for place, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise PlanMismatch(f"{what}[{place}]={value!r}: expected a number from 0 to 1")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_flag(what: str, value: object) -> None:
    """Raise PlanMismatch unless `value` is True or False; a word would count as True."""
    if not isinstance(value, bool):
        raise PlanMismatch(f"{what}={value!r} is a {type(value).__name__}; expected True or False")


def check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    """Raise PlanMismatch, listing what is known, unless `value` is among it."""
    if value not in known:
        raise PlanMismatch(f"{what} {value!r} is unknown; known are {', '.join(known)}")


def check_divides(what: str, part: int, whole: int) -> None:
    """Raise PlanMismatch, listing what divides `whole`, unless `part` does."""
    if part < 1 or whole % part:
        legal = ", ".join(map(str, divisors(whole)))
        raise PlanMismatch(f"{what} {part} does not divide {whole}; legal are {legal}")


def check_trains(plan: Plan) -> None:
    """Raise PlanMismatch, naming them, where ranks lie on an axis that splits a generation only."""
    others = [f"{axis} {plan.sizes[axis]}" for axis in ("step", "cfg") if plan.sizes[axis] > 1]
    if others:
        raise PlanMismatch(
            f"{plan}: {', '.join(others)} of a training\n"
            "  why: that axis splits a generation; its ranks would repeat one another's work\n"
            "  to fix: leave it out, or let dp or cp have these ranks"
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
