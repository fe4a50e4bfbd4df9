"""What is asked of a training run, as frozen data; standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stretto.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float64")
OPTIMIZERS = ("adamw", "sgd")
DOCUMENTS = ("apart", "joined")
#: Seeds lie below; the order of held-out text has a key of its own there.
SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """How weights follow gradients: the optimizer, its schedule and clipping.

    The rate rises linearly over `warmup` steps, then falls along a cosine to `final` of itself at
    the last step. `clip`: largest norm of all gradients together, 0 for no clipping. Raises
    ConfigError.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: float = 1e-3
    warmup: int = 20
    final: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self):
        _known("optimizer", self.optimizer, OPTIMIZERS)
        numbers = (self.rate, self.warmup, self.weight_decay, self.clip)
        if not all(map(_counts, numbers)) or not self.rate:
            names = ("rate", "warmup", "weight decay", "clip")
            given = ", ".join(f"{name} {n!r}" for name, n in zip(names, numbers, strict=True))
            raise ConfigError(
                f"{given}: the rate is above 0, the others at least 0, all of them finite\n"
                "  why: weights would not move, grow without end, or be no numbers\n"
                "  to fix: as in --rate 1e-3 --warmup 20 --weight-decay 0.1 --clip 1; --clip 0 is "
                "no clipping"
            )
        if not _whole(self.warmup):
            raise ConfigError(f"warmup {self.warmup!r}: it counts steps, as in --warmup 20")
        if not (_counts(self.final) and self.final <= 1):
            raise ConfigError(
                f"final {self.final!r}: the part of the rate that is left at the last step, 0 to 1"
            )
        self._check_betas()

    def _check_betas(self) -> None:
        """Raise ConfigError for what Adam's two means cannot be kept with."""
        two = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not two or not all(_counts(beta) and beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas {self.betas!r}: two numbers, each at least 0 and below 1\n"
                "  why: they are what is kept of Adam's two means at every step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained, on what and for how long; nothing in it depends on the number of ranks.

    `model`: a preset, or a folder with a transformers config.json. `data`: a file or folder of
    text, None for the installed standard library. `tokens` of one sequence, `sequences` of one
    step. `window`: keys that a token sees, itself included, None for all. `documents`: `apart`
    where a token sees its own file only, `joined` where it sees all that is packed before it, None
    for what the model is meant for: presets apart, models of transformers joined. `recompute`: keep
    less of the forward pass, at a third more arithmetic outside attention.
    """

    model: str = "gpt-tiny"
    data: str | None = None
    tokens: int = 1024
    sequences: int = 8
    steps: int = 100
    seed: int = 0
    dtype: str = "float32"
    window: int | None = None
    documents: Literal["apart", "joined"] | None = None
    recompute: bool = False
    descent: Descent = field(default_factory=Descent)

    def __post_init__(self):
        _known("dtype", self.dtype, DTYPES)
        if self.documents is not None:
            _known("documents", self.documents, DOCUMENTS)
        for name in ("tokens", "sequences", "steps", "window"):
            value = getattr(self, name)
            if not (value is None and name == "window") and not (_whole(value) and value >= 1):
                raise ConfigError(f"{name}={value!r}: a whole number, at least 1")
        if not (_whole(self.seed) and 0 <= self.seed < SEEDS):
            raise ConfigError(
                f"seed {self.seed!r}: from 0 to {SEEDS - 1}\n"
                "  why: it is half of a key of 128 bits that orders the data\n"
                "  to fix: as in --seed 0"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def accumulation(sequences: int, data_ranks: int, micro_batch: int) -> int:
    """Micro-batches that each data rank works through in a step.

    Raises ConfigError, naming what divides, when the sequences do not share out evenly: a batch
    that depended on the number of ranks would make runs incomparable.
    """
    together = data_ranks * micro_batch
    if sequences % together:
        near = max(together, round(sequences / together) * together)
        fits = [d for d in range(1, sequences + 1) if sequences % (d * micro_batch) == 0]
        raise ConfigError(
            f"{sequences} sequences per step do not share out over {data_ranks} data rank(s) in "
            f"micro-batches of {micro_batch}\n"
            f"  to fix: {near} sequences"
            + (f", or data ranks {', '.join(map(str, fits))}" if fits else "")
        )
    return sequences // together


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{what} {value!r} is unknown; known are {', '.join(known)}")
