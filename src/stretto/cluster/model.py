"""The noun Cluster: devices, the nodes they sit in, and the links between them."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from stretto import documents
from stretto.errors import ConfigError
from stretto.quantities import FlopRate, Memory, Rate, Seconds

SCHEMA = "cluster/1"
Basis = Literal["measured", "published", "projected"]
#: The dtypes of a device's matmul rate, in the order in which they are looked up.
DTYPES = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8")
#: Above 1 kernels and messages side by side take longer than one after the other, which contention
#: may do to some degree; more than this is a mistake.
MOST_DISPLACED = 2.0


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kernel(_Frozen):
    """FLOP/s that attention kernels reach: forward and backward, both on blocks of many rows.

    `short` lists (rows, part of the forward rate, of the backward rate) of smaller blocks, in rows
    of the shorter side; between two entries a part follows the logarithm of the rows, below the
    first it falls in proportion. `launch`: seconds of a step beside its products, of any dtype.
    """

    forward: FlopRate = Field(gt=0)
    backward: FlopRate = Field(gt=0)
    short: tuple[tuple[int, float, float], ...] = ()
    launch: Seconds = 0.0
    source: str

    @model_validator(mode="after")
    def _rising(self) -> Kernel:
        rows = [entry[0] for entry in self.short]
        parts = [part for entry in self.short for part in entry[1:]]
        if rows != sorted(set(rows)) or min(rows, default=1) < 1:
            raise ValueError(f"short: rows {rows} must rise from at least 1")
        if not all(0 < part <= 1 for part in parts):
            raise ValueError(f"short: parts {parts} must lie above 0 and not above 1")
        return self


class Device(_Frozen):
    """One kind of device: its memory in bytes, rates in bytes/s and FLOP/s, and who says so.

    A FLOP rate is that of dense matrix products; `spread` is its relative uncertainty.
    `attention` is what attention kernels reach of it, where that is known.
    """

    memory: Memory = Field(gt=0)
    memory_rate: Rate = Field(gt=0)
    fp64: FlopRate | None = None
    fp32: FlopRate | None = None
    tf32: FlopRate | None = None
    bf16: FlopRate | None = None
    fp16: FlopRate | None = None
    fp8: FlopRate | None = None
    spread: float | None = Field(None, ge=0)
    attention: Kernel | None = None
    source: str

    def flop_rate(self, dtype: str) -> float:
        """FLOP per second in a dtype. Raises ConfigError listing the dtypes that are known."""
        rate = getattr(self, dtype, None) if dtype in DTYPES else None
        if not rate:
            known = ", ".join(name for name in DTYPES if getattr(self, name))
            raise ConfigError(f"no {dtype} rate of this device is known ({self.source}): {known}")
        return rate


def _devices(value: object) -> object:
    """("big", 8) from "8 x big"."""
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\S+)\s*", value) if isinstance(value, str) else None
    if not match:
        if isinstance(value, tuple):
            return value
        raise ValueError(f"{value!r} is not of the form '8 x NAME'")
    return match[2], int(match[1])


class Node(_Frozen):
    """Some devices of one kind that share a link; `devices` is (kind, how many)."""

    name: str
    devices: Annotated[
        tuple[str, int],
        BeforeValidator(_devices),
        PlainSerializer(lambda pair: f"{pair[1]} x {pair[0]}"),
    ]


class Link(_Frozen):
    """What two devices of one node (`within`) or of two nodes (`between`) exchange.

    `rate` is bytes/s each way and `latency` seconds of one message; with duplex `half` the two
    ways share the rate. `spread` is the relative uncertainty of a message's time.

    `displaces`: seconds that kernels lose to a message beside them, as a part of its bytes / rate.
    Copying takes multiprocessors and memory rate from them: 0 where it takes nothing, 1 where they
    stand still meanwhile. Only inside a node; an interface carries by itself what leaves one.
    """

    within: str | None = None
    between: tuple[str, str] | None = None
    rate: Rate = Field(gt=0)
    latency: Seconds
    duplex: Literal["full", "half"] = "full"
    displaces: float = Field(0.0, ge=0, le=MOST_DISPLACED)
    spread: float | None = Field(None, ge=0)
    source: str = ""

    @model_validator(mode="after")
    def _one_place(self) -> Link:
        if (self.within is None) == (self.between is None):
            raise ValueError("a link is either `within` one node or `between` two")
        if self.between and self.displaces:
            raise ValueError(f"displaces {self.displaces:g}: only a link within a node has that")
        return self

    @property
    def name(self) -> str:
        """How traffic tables call it."""
        return f"within {self.within}" if self.between is None else " - ".join(self.between)

    def joins(self, a: str, b: str) -> bool:
        """Whether devices of nodes a and b talk over this link."""
        return (a == b == self.within) if self.between is None else {a, b} == set(self.between)


class Network(_Frozen):
    """What devices of different nodes talk over, where no link between two nodes is written.

    `rate` is bytes/s each way of one network interface and `latency` seconds of one message.
    `per`: each device has an interface of its own, or a node has one that its devices share.
    """

    rate: Rate = Field(gt=0)
    latency: Seconds
    per: Literal["device", "node"]
    spread: float | None = Field(None, ge=0)
    source: str = ""

    def link(self, a: str, b: str) -> Link:
        """The link between two nodes over this network."""
        ends = (min(a, b), max(a, b))
        return Link(
            between=ends,
            rate=self.rate,
            latency=self.latency,
            spread=self.spread,
            source=self.source,
        )


class Cluster(_Frozen):
    """Devices, nodes and links. Ranks count through the nodes in the order written.

    `network` joins all nodes that no link joins. `basis`: measured (by `stretto probe`), published
    (data sheets), projected (assumed); `date` and `software` say when and with what. `read`
    raises ConfigError naming file, line and field.
    """

    name: str
    basis: Basis
    date: str = ""
    software: str = ""
    devices: dict[str, Device] = Field(min_length=1)
    nodes: tuple[Node, ...] = Field(min_length=1)
    links: tuple[Link, ...] = ()
    network: Network | None = None

    @model_validator(mode="after")
    def _complete(self) -> Cluster:
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            raise ValueError(f"nodes: names repeat in {names}")
        for node in self.nodes:
            kind, count = node.devices
            if kind not in self.devices:
                raise ValueError(
                    f"nodes.{node.name}: unknown device {kind!r}, known are "
                    f"{', '.join(self.devices)}"
                )
            if count < 1:
                raise ValueError(f"nodes.{node.name}: {count} devices, at least 1 is needed")
        _check_links(self, names)
        return self

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Cluster:
        """A cluster from a file, or from the preset of that name. Raises ConfigError."""
        known = presets()
        path = known[str(source)] if str(source) in known else Path(source)
        if not path.exists():
            raise ConfigError(
                f"no cluster file and no preset {str(source)!r}\n"
                f"  to fix: `stretto probe -o cluster.yaml`, or a preset: {', '.join(known)}"
            )
        return documents.load(cls, documents.read(path, SCHEMA))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `cluster/1`; an existing file is replaced at once or not at all."""
        documents.write(self, path, SCHEMA)

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(node, device kind) of each rank."""
        return tuple(
            (node.name, node.devices[0]) for node in self.nodes for _ in range(node.devices[1])
        )

    @property
    def size(self) -> int:
        """How many devices there are, and so ranks."""
        return sum(node.devices[1] for node in self.nodes)

    def device(self, rank: int) -> Device:
        return self.devices[self.places[rank][1]]

    def link(self, a: int, b: int) -> Link:
        """The link between two ranks' devices."""
        ends = self.places[a][0], self.places[b][0]
        found = next((link for link in self.links if link.joins(*ends)), None)
        if found is None:
            assert self.network is not None, "a cluster without a network has all links"
            return self.network.link(*ends)
        return found

    def first(self, count: int) -> Cluster:
        """The same cluster cut down to its first `count` devices. Raises ConfigError."""
        if not 1 <= count <= self.size:
            raise ConfigError(f"{count} devices of {self.name}, which has {self.size}")
        nodes, left = [], count
        for node in self.nodes:
            taken = min(left, node.devices[1])
            if taken:
                nodes.append(node.model_copy(update={"devices": (node.devices[0], taken)}))
            left -= taken
        kept = {node.name for node in nodes}
        links = [k for k in self.links if {k.within, *(k.between or ())} - {None} <= kept]
        return self.model_copy(update={"nodes": tuple(nodes), "links": tuple(links)})


def presets() -> dict[str, Path]:
    """The clusters that come with stretto, by name."""
    folder = Path(str(resources.files("stretto.cluster") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _check_links(cluster: Cluster, names: list[str]) -> None:
    """Every pair of devices has exactly one link; a network is one between any two nodes."""
    for link in cluster.links:
        unknown = {link.within, *(link.between or ())} - {None, *names}
        if unknown:
            raise ValueError(
                f"links: {link.name}: unknown node {', '.join(sorted(map(str, unknown)))}"
            )
    pairs = [(n.name, n.name) for n in cluster.nodes if n.devices[1] > 1]
    pairs += [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for a, b in pairs:
        found = sum(link.joins(a, b) for link in cluster.links)
        if found != 1 and not (found == 0 and a != b and cluster.network):
            where = f"within {a}" if a == b else f"between {a} and {b}"
            raise ValueError(f"links: {found} links {where}, exactly one is needed")
