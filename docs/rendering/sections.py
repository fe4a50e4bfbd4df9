"""Which section a result gets, by its case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rendering import attention, cells, steps

#: In the order of the page. A case that lies below another one is written like it.
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "exactness": steps.exactness,
    "diffusion/steps": steps.on_cores,
    "diffusion/steps-fidelity": steps.fidelity,
    "diffusion/steps-slices": steps.slices,
    "diffusion/steps-gpus": steps.gpus,
    "diffusion/steps-overhead": steps.overhead,
    "attention": cells.figures,
    "links": attention.links,
    "attention peers": attention.peers,
    "attention/kernels": attention.kernels,
    "attention/gpus": attention.gpus,
    "attention/projection": attention.projection,
    "train": attention.training,
    "train/slices": attention.slices,
    "train/gpus": attention.train_gpus,
    "families": attention.families,
    "mesh/kill": attention.kill,
    "mesh/exchange": attention.exchange,
}


def kind_of(case: str) -> str:
    """The longest case in SECTIONS that this one is or lies below. Raises KeyError."""
    known = case
    while known not in SECTIONS:
        known, slash, _ = known.rpartition("/")
        if not slash:
            raise KeyError(f"no section for results of {case!r}: add one to docs/rendering")
    return known
