"""What is asked of a training run, as frozen data; standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stretto.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float64")
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """How weights follow gradients: the optimizer, its schedule and clipping.

    The rate rises linearly over `warmup` steps, then falls along a cosine to `final` of itself at
    the last step. `clip`: largest norm of all gradients together, 0 for no clipping.
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
        if self.rate <= 0 or self.clip < 0 or self.warmup < 0:
            raise ConfigError(
                f"rate {self.rate:g}, clip {self.clip:g}, warmup {self.warmup}: the rate is above "
                "0, the others at least 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained, on what and for how long; nothing in it depends on the number of ranks.

    `model`: a preset, or a folder with a transformers config.json. `data`: a file or folder of
    text, None for the installed standard library. `tokens` of one sequence, `sequences` of one
    step. `recompute`: keep less of the forward pass, at a third more arithmetic outside attention.
    """

    model: str = "gpt-tiny"
    data: str | None = None
    tokens: int = 1024
    sequences: int = 8
    steps: int = 100
    seed: int = 0
    dtype: str = "float32"
    recompute: bool = False
    descent: Descent = field(default_factory=Descent)

    def __post_init__(self):
        _known("dtype", self.dtype, DTYPES)
        for name in ("tokens", "sequences", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1")

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


def _known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{what} {value!r} is unknown; known are {', '.join(known)}")
