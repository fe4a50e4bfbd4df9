"""The vocabulary of mesh axes.

An *axis* is a direction of the mesh of ranks; a *dim* is a direction of a tensor. World size is
the product of all axis sizes, and an axis of size 1 is legal everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Mesh order, outermost first: neighbours on a later axis sit closer together. `step` is
#: outermost because it sends least and so tolerates the slowest link.
ORDER = ("step", "cfg")


def ordered(sizes: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes in mesh order, absent axes as 1."""
    unknown = set(sizes) - set(ORDER)
    assert not unknown, f"unknown axes {sorted(unknown)}, known are {ORDER}"
    return {axis: sizes.get(axis, 1) for axis in ORDER}


def world_size(sizes: Mapping[str, int]) -> int:
    """Number of ranks of a mesh with these axis sizes."""
    total = 1
    for size in sizes.values():
        total *= size
    return total


def coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Position on every axis of a global rank; the last axis varies fastest."""
    place = {}
    for axis in reversed(list(sizes)):
        rank, place[axis] = divmod(rank, sizes[axis])
    return {axis: place[axis] for axis in sizes}


def peers(rank: int, axis: str, sizes: Mapping[str, int]) -> list[int]:
    """Global ranks that share every coordinate with `rank` but the one on `axis`, in order."""
    here = coordinates(rank, sizes)
    return [
        other
        for other in range(world_size(sizes))
        if all(c == here[a] for a, c in coordinates(other, sizes).items() if a != axis)
    ]
