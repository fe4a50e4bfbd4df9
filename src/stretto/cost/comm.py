"""Seconds of a collective on a link: latency per message and bytes over rate.

All-gather walks a ring, broadcast a binary tree. Source: Thakur, Rabenseifner, Gropp 2005,
"Optimization of collective communication operations in MPICH", sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stretto import axes
from stretto.cluster.model import Cluster, Link
from stretto.plan.model import Plan


@dataclass(frozen=True)
class Path:
    """A link that groups of ranks on an axis talk over, and how many of them share it."""

    link: Link
    sharing: int

    @property
    def rate(self) -> float:
        """Bytes per second each way for one of the groups that share the link."""
        return self.link.rate / self.sharing / (2 if self.link.duplex == "half" else 1)

    def seconds(self, verb: str, sent_bytes: float, ranks: int) -> float:
        """Time of one collective in which the busiest rank sends `sent_bytes` to `ranks` - 1."""
        message = sent_bytes if verb in ("permute", "shift") else sent_bytes / (ranks - 1)
        return hops(verb, ranks) * (message / self.rate + self.link.latency)


def hops(verb: str, ranks: int) -> int:
    """Messages that follow one another in a collective of at least two ranks."""
    known = {
        "all_gather": ranks - 1,
        "all_to_all": ranks - 1,
        "broadcast": (ranks - 1).bit_length(),
        "permute": 1,
        "shift": 1,
    }
    return known[verb]


def groups(plan: Plan, axis: str) -> list[tuple[int, ...]]:
    """The groups of ranks on an axis, each in axis order; none for an axis of one rank."""
    if plan.sizes[axis] == 1:
        return []
    everyone = range(plan.world_size)
    return sorted({tuple(axes.peers(rank, axis, plan.sizes)) for rank in everyone})


def links_of(cluster: Cluster, group: Sequence[int]) -> list[Link]:
    """The different links between members of a group."""
    pairs = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
    return list(dict.fromkeys(cluster.link(a, b) for a, b in pairs))


def slowest_link(cluster: Cluster, group: Sequence[int]) -> Link:
    """The link of least rate in a group of at least two ranks."""
    return min(links_of(cluster, group), key=lambda link: (link.rate, -link.latency))


def paths(cluster: Cluster, plan: Plan, axis: str) -> list[Path]:
    """The different paths of an axis' groups, none for an axis of one rank.

    Groups that talk over one link between nodes do so at the same time and share its rate.
    """
    used = [link for group in groups(plan, axis) for link in links_of(cluster, group)]
    return [Path(k, used.count(k) if k.between else 1) for k in dict.fromkeys(used)]


def slowest(over: list[Path], verb: str, sent_bytes: float, ranks: int) -> float:
    """Seconds until the last group has finished one collective."""
    return max((path.seconds(verb, sent_bytes, ranks) for path in over), default=0.0)
