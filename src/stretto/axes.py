"""The vocabulary of mesh axes.

An *axis* is a direction of the mesh of ranks; a *dim* is a direction of a tensor. World size is
the product of all axis sizes, and an axis of size 1 is legal everywhere. A *composite* axis is
several axes read as one: a rank's position on it is row-major over its parts, whatever the order
of the mesh, so shards that follow it do not depend on where ranks are placed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

#: Mesh order, outermost first: neighbours on a later axis sit closer together. `step` is
#: outermost because it sends least and so tolerates the slowest link. `ring_out` and `team_out`
#: cross nodes, `ring_in`, `team_in` and `ulysses` stay within one.
ORDER = ("step", "fsdp", "cfg", "ring_out", "team_out", "ring_in", "team_in", "ulysses")

#: Composite axes by name. `cp` is all that splits a sequence: a position on it is the logical
#: index ((ring * |team| + team) * |ulysses| + ulysses) that sequence shards follow.
COMPOSITE = {
    "ring": ("ring_out", "ring_in"),
    "team": ("team_out", "team_in"),
    "cp": ("ring_out", "ring_in", "team_out", "team_in", "ulysses"),
}

#: Every name that a mesh understands.
NAMES = (*ORDER, *COMPOSITE)


def ordered(sizes: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes in mesh order, absent axes as 1; a mapping of all axes keeps its own order."""
    unknown = set(sizes) - set(ORDER)
    assert not unknown, f"unknown axes {sorted(unknown)}, known are {ORDER}"
    if len(sizes) == len(ORDER):
        return dict(sizes)
    return {axis: sizes.get(axis, 1) for axis in ORDER}


def parts(axis: str) -> tuple[str, ...]:
    """The axes a composite axis is made of, outermost first; a plain axis is its only part."""
    return COMPOSITE.get(axis, (axis,))


def world_size(sizes: Mapping[str, int]) -> int:
    """Number of ranks of a mesh with these axis sizes."""
    return math.prod(sizes.values())


def size(axis: str, sizes: Mapping[str, int]) -> int:
    """Number of ranks on an axis, plain or composite."""
    return math.prod(sizes[part] for part in parts(axis))


def coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Position on every axis of a global rank; the last axis varies fastest."""
    place = {}
    for axis in reversed(list(sizes)):
        rank, place[axis] = divmod(rank, sizes[axis])
    return {axis: place[axis] for axis in sizes}


def rank_at(place: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """The global rank at a position on every axis: the inverse of `coordinates`."""
    rank = 0
    for axis, length in sizes.items():
        rank = rank * length + place[axis]
    return rank


def position(rank: int, axis: str, sizes: Mapping[str, int]) -> int:
    """A global rank's position on an axis, plain or composite."""
    place = coordinates(rank, sizes)
    found = 0
    for part in parts(axis):
        found = found * sizes[part] + place[part]
    return found


def peers(rank: int, axis: str, sizes: Mapping[str, int]) -> list[int]:
    """Global ranks that differ from `rank` at most on `axis`, by their position on it."""
    here = coordinates(rank, sizes)
    names = parts(axis)
    places = itertools.product(*(range(sizes[part]) for part in names))
    return [rank_at(here | dict(zip(names, place, strict=True)), sizes) for place in places]
