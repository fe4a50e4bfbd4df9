"""Whole numbers on a command line: read exactly, never rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter, validators

if TYPE_CHECKING:
    from cyclopts import Token


def whole(kind: Any, tokens: Sequence[Token]) -> int:
    """The number of a token. Raises ValueError for 2.5, which cyclopts alone would round to 2."""
    return _whole(tokens[0].value)


def wholes(kind: Any, tokens: Sequence[Token]) -> list[int]:
    """The numbers of an option that takes several. Raises ValueError."""
    return [_whole(token.value) for token in tokens]


def _whole(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        value = float(text)  # 1e6 and 2.0 are whole
        if value.is_integer():
            return int(value)
    raise ValueError(f"{text!r} is no whole number.")


#: What options of counts are annotated with.
AT_LEAST_1 = Parameter(converter=whole, validator=validators.Number(gte=1))
AT_LEAST_0 = Parameter(converter=whole, validator=validators.Number(gte=0))
