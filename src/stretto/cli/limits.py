"""How much a command takes on: checked before anything is started or reserved."""

from __future__ import annotations

from cyclopts import Parameter, validators

from stretto.cli.whole import whole
from stretto.cluster import detect
from stretto.errors import ConfigError

#: Memory that a rank has for itself, beside what ranks share: 49 MiB of dirty pages were seen with
#: the shipped DiT (November 2026). More ranks than fit take the machine with them.
RANK_BYTES = 48 * 2**20

#: Schedulers are trained on about 1000 steps. A slip such as 1e9 would fill the memory with the
#: noise grid, and the machine kills the process without a word.
MOST_STEPS = 10_000
#: What options that count denoising steps, or generations in turn, are annotated with.
COUNT = Parameter(converter=whole, validator=validators.Number(gte=1, lte=MOST_STEPS))


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
