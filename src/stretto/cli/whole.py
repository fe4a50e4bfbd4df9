"""Whole numbers on a command line, and how many ranks and threads this machine can hold."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter, validators

from stretto.cluster import detect
from stretto.errors import ConfigError

if TYPE_CHECKING:
    from cyclopts import Token

#: Memory that a rank has for itself, beside what ranks share: 49 MiB of dirty pages were seen with
#: the shipped DiT (November 2026). More ranks than fit take the machine with them.
RANK_BYTES = 48 * 2**20


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


def check_ranks(ranks: int) -> None:
    """Raise ConfigError for more ranks than this machine's memory can hold."""
    memory = detect.memory_bytes()
    if ranks * RANK_BYTES > memory:
        raise ConfigError(
            f"{ranks} ranks: each takes {RANK_BYTES >> 20} MiB or more for itself, and this "
            f"machine has {memory / 2**30:.1f} GiB\n"
            f"  to fix: at most {memory // RANK_BYTES} ranks; more than one per core or GPU of "
            "this machine gain no speed"
        )


def check_threads(threads: int) -> None:
    """Raise ConfigError for more threads per rank than there are cores: torch would crash."""
    cores = detect.usable_cores()
    if threads > cores:
        raise ConfigError(
            f"--threads {threads}: this machine has {cores} core(s)\n"
            "  why: threads of a rank that wait for one another's core make every step slower\n"
            f"  to fix: --threads {cores} or fewer, and fewer still with several ranks"
        )
