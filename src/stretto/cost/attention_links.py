"""Which links carry the messages of sequence-parallel attention, and how long that takes.

Seconds of equal messages at once: the most loaded device or network interface, messages x latency
+ bytes / rate, in and out counted apart. In-node links and the network work side by side, but on
nodes that are one host: there in-node messages and latencies are work of its cores. Elsewhere the
work of messages is what kernels beside them lose (`Link.displaces`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from stretto import axes
from stretto.cluster.model import Cluster, Link, Network
from stretto.cost.attention_bytes import Term
from stretto.cost.attention_host import Cost, Host, SharedHost, arriving
from stretto.errors import ConfigError

Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Messages of one go on the busiest device inside its node, and on the busiest interface.

    `in_node`: of a device. `latent`: of a device to other nodes. `network`: of an interface.
    `crossing`: to other nodes, of all ranks together; `all_ranks`: all messages.
    """

    in_node: int
    latent: int
    network: int
    crossing: int
    all_ranks: int


@dataclass(frozen=True, slots=True)
class Fabric:
    """The links of a cluster as attention sees them: the slowest inside nodes, and the network.

    `per_node`: devices of a node share one interface. `nodes`: the node of each device. `host`:
    of nodes that share one machine's cores, None where devices move bytes themselves.
    """

    inside: Link | None
    network: Network | None
    nodes: tuple[int, ...]
    host: Host | None = None

    @property
    def per_node(self) -> bool:
        return self.network is not None and self.network.per == "node"

    def cost(self, load: Load, message: int) -> Cost:
        """Until the last of equal messages has arrived."""
        inside = displaced = latency = wire = 0.0
        if load.in_node:
            assert self.inside is not None, "devices of one node have a link"
            half = 2 if self.inside.duplex == "half" else 1
            copied = load.in_node * half * message / self.inside.rate
            inside = load.in_node * self.inside.latency + copied
            displaced = self.inside.displaces * copied
        if load.network:
            assert self.network is not None, "devices of two nodes have a network"
            latency = load.latent * self.network.latency
            wire = load.network * message / self.network.rate
        if self.host is None:
            return Cost(work=displaced, wire=max(inside, latency + wire))
        return Cost(work=inside + latency, wire=wire)


def fabric_of(cluster: Cluster) -> Fabric:
    """The links of a cluster. Links between two nodes count as an interface that a node shares."""
    names = list(dict.fromkeys(node for node, _ in cluster.places))
    inside = [link for link in cluster.links if link.within is not None]
    between = [link for link in cluster.links if link.between is not None]
    network = cluster.network
    if between:
        slow = min(between, key=lambda link: link.rate)
        half = 2 if slow.duplex == "half" else 1
        network = Network(rate=slow.rate / half, latency=slow.latency, per="node", source="slowest")
    if len(names) > 1 and network is None:
        raise ConfigError(f"{cluster.name}: {len(names)} nodes, and nothing joins them")
    slowest = min(inside, key=lambda link: link.rate, default=None)
    places = tuple(names.index(node) for node, _ in cluster.places)
    host = cluster.host if isinstance(cluster, SharedHost) else None
    return Fabric(slowest, network, places, host)


def cost_of(term: Term, sizes: Mapping[str, int], fabric: Fabric) -> Cost:
    """One go of a term's messages; `term.times` of them follow one another."""
    cost = fabric.cost(load_of(term, sizes, fabric), term.message)
    if fabric.host is None:
        return cost
    return cost._replace(work=cost.work + arriving(term, sizes, fabric.host))


def load_of(term: Term, sizes: Mapping[str, int], fabric: Fabric) -> Load:
    """Where one go of a term's messages passes. Ranks take the devices in the order of `sizes`."""
    return _load(term.pattern, term.axis, tuple(sizes.items()), fabric.nodes, fabric.per_node)


@lru_cache(maxsize=65536)
def _load(pattern: str, axis: str, order: Sizes, nodes: tuple[int, ...], per_node: bool) -> Load:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    latent: Counter[int] = Counter()
    network: Counter[tuple[bool, int]] = Counter()
    for src, dst in pairs(pattern, axis, order):
        if nodes[src] == nodes[dst]:
            sent[src] += 1
            received[dst] += 1
            continue
        latent[src] += 1
        network[True, nodes[src] if per_node else src] += 1
        network[False, nodes[dst] if per_node else dst] += 1
    crossing = sum(latent.values())
    return Load(
        in_node=max((*sent.values(), *received.values()), default=0),
        latent=max(latent.values(), default=0),
        network=max(network.values(), default=0),
        crossing=crossing,
        all_ranks=crossing + sum(sent.values()),
    )


def pairs(pattern: str, axis: str, order: Sizes) -> Iterator[tuple[int, int]]:
    """(sender, receiver) of the messages of one go, as physical ranks."""
    sizes = dict(order)
    members = axes.parts(axis)
    for rank in range(axes.world_size(sizes)):
        if any(axes.coordinates(rank, sizes)[name] for name in members):
            continue  # the first of each group stands for it
        group = axes.peers(rank, axis, sizes)
        if pattern == "exchange":
            yield from itertools.permutations(group, 2)
            continue
        for here, there in enumerate(_targets(pattern, len(group), sizes)):
            if here != there:
                yield group[here], group[there]


def _targets(pattern: str, count: int, sizes: Mapping[str, int]) -> list[int]:
    """Where the message of each position of a group of `count` goes."""
    team, ulysses = axes.size("team", sizes), sizes["ulysses"]
    if pattern == "shift":
        return [(here - 1) % count for here in range(count)]
    if pattern == "sub-ring":
        length = count // team
        return [here - here % length + (here - 1) % length for here in range(count)]
    assert pattern == "transpose", pattern
    # StarTrail's placement: rank t*C + m sends to m*T + t, heads stay with their Ulysses position.
    teams, found = count // ulysses // team, []
    for here in range(count):
        place, head = divmod(here, ulysses)
        found.append((place % team * teams + place // team) * ulysses + head)
    return found
