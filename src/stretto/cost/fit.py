"""Rate and latency of a link from measured messages, by the same formula that estimates use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from stretto.cost.comm import hops


class Sample(Protocol):
    """A measured collective: a message of `num_bytes` per rank took `seconds`."""

    @property
    def verb(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class Fit:
    """Bytes/s, seconds a hop, and the relative rms error of the line through the samples."""

    rate: float
    latency: float
    spread: float


def fit_link(samples: Iterable[Sample]) -> Fit:
    """Least squares of the relative error of seconds = hops x (latency + bytes / rate).

    Relative, because absolute errors of the largest message would drown every latency. Neither
    term becomes negative. Needs at least one sample of positive size and time.
    """
    rows = [(hops(s.verb, s.ranks), s.num_bytes, s.seconds) for s in samples]
    # Divided by its time each row asks for 1 = latency u + v / rate.
    us = [h / t for h, _, t in rows]
    vs = [h * n / t for h, n, t in rows]
    uu, vv = sum(u * u for u in us), sum(v * v for v in vs)
    uv = sum(u * v for u, v in zip(us, vs, strict=True))
    determinant = uu * vv - uv * uv
    latency = inverse = -1.0
    if determinant > 1e-12 * uu * vv:
        latency = (vv * sum(us) - uv * sum(vs)) / determinant
        inverse = (uu * sum(vs) - uv * sum(us)) / determinant
    if latency < 0 or inverse <= 0:
        # The constrained optimum lies on the edge: all of the time belongs to the rate.
        latency, inverse = 0.0, sum(vs) / vv
    errors = [(latency * u + inverse * v - 1) ** 2 for u, v in zip(us, vs, strict=True)]
    return Fit(1 / inverse, latency, (sum(errors) / len(errors)) ** 0.5)
