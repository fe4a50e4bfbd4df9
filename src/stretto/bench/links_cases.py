"""What `bench links` runs: node layouts, attention calls, plans, and what each must take at least.

Arithmetic only. A block, the queries of one rank, is 64 KiB. Tensors are float64: that gives a
block the fewest elements, so the host's own arithmetic (merging, adding) weighs least; which plan
sends how many blocks does not depend on it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from stretto import axes
from stretto.cluster.model import Cluster, Device, Kernel, Link, Network, Node
from stretto.cost import attention
from stretto.cost.attention_host import Host, SharedHost
from stretto.cost.train import TrainEstimate, estimate
from stretto.plan.context import named_points
from stretto.plan.model import Plan
from stretto.plan.moves import PASSES
from stretto.plan.options import AttentionCase, Context
from stretto.plan.ranges import Mask
from stretto.plan.schedule import schedule
from stretto.search.attention import rank_plans
from stretto.workload.arch import Arch
from stretto.workload.train import Training

#: Modes: kernels that take no time; kernels that sleep as long as the model says; the first again
#: on links so fast that the machine's own cores count as much, for the plans that are quoted.
FREE, TIMED, FAST = "communication", "timed compute", "communication, fast links"
#: FLOP/s of a kernel that takes no time.
NO_TIME = 1e21


@dataclass(frozen=True, slots=True)
class Layout:
    """Nodes and ranks of each; a rank's node follows from its number."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def node_of(self) -> tuple[int, ...]:
        return tuple(rank // self.per_node for rank in range(self.ranks))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}"


@dataclass(frozen=True, slots=True)
class Call:
    """A causal attention of equal shards in float64: `rows` x `heads` x `head_dim` per rank.

    As many heads as in one tensor-parallel share of a model: too few for Ulysses over 16 ranks.
    """

    kv_heads: int
    heads: int = 8
    rows: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        ratio = self.heads // self.kv_heads
        return "MHA" if ratio == 1 else f"{ratio}:1"

    @property
    def block_bytes(self) -> int:
        return 8 * self.rows * self.heads * self.head_dim

    def of(self, context: Context, rank: int = 0) -> AttentionCase:
        """The call as a rank sees it."""
        return AttentionCase.of(
            context,
            tokens=self.rows * context.degree,
            heads=(self.heads, self.kv_heads),
            head_dim=self.head_dim,
            item_bytes=8,
            mask=Mask(causal=True),
            rank=rank,
        )

    def training(self, ranks: int) -> Training:
        """The same as a training step of one layer, for the cost model."""
        width = self.heads * self.head_dim
        arch = Arch(
            name="emulated",
            layers=1,
            width=width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            feed_forward=width,
            vocab=0,
        )
        return Training.of(arch, self.rows * ranks, dtype="fp64")


@dataclass(frozen=True, slots=True)
class Rates:
    """Of the emulated cluster. `network`: a node's interface, bytes/s each way, as it is limited;
    the others measured here, before any plan runs, with all ranks at it: bytes/s of a rank inside
    its node, seconds of a small message inside a node and between two; `step`, `merge_rate`,
    `add_rate`, `overlap` as in `stretto.cost.attention_host.Host`.
    """

    network: float
    inside: float
    latency_inside: float
    latency_across: float
    step: float
    merge_rate: float
    add_rate: float
    overlap: float

    def cluster(self, layout: Layout, flop_rate: float) -> SharedHost:
        """The cluster that the cost model is asked about."""
        names = [f"n{number}" for number in range(layout.nodes)]
        inside = {"rate": self.inside, "latency": self.latency_inside, "source": "measured"}
        joined = names if layout.per_node > 1 else ()
        return SharedHost(
            name=f"{layout} namespaces",
            basis="measured",
            devices={"rank": device_of(flop_rate)},
            nodes=tuple(Node(name=name, devices=("rank", layout.per_node)) for name in names),
            links=tuple(Link(within=name, **inside) for name in joined),
            network=Network(
                rate=self.network, latency=self.latency_across, per="node", source="limited"
            ),
            host=Host(
                overlap=self.overlap,
                step=self.step,
                merge_rate=self.merge_rate,
                add_rate=self.add_rate,
            ),
        )


def device_of(flop_rate: float) -> Device:
    """The modelled device, by its matmul rate."""
    source = "emulated by sleeping"
    # Rates of attention kernels are known of short dtypes alone, and so not asked for here.
    kernel = Kernel(forward=flop_rate, backward=flop_rate, source=source)
    sizes = {"memory": 2**40, "memory_rate": 1e12}
    return Device(**sizes, fp64=flop_rate, attention=kernel, source=source)


def kernel_of(flop_rate: float) -> Kernel:
    """Rates of its attention kernels, as the cost model takes them."""
    return attention.kernel_of(device_of(flop_rate), "fp64")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A plan to be timed: its names, and what the cost model says of it."""

    names: tuple[str, ...]
    plan: Plan
    estimate: TrainEstimate

    @property
    def quoted(self) -> bool:
        """Whether the summary speaks of it."""
        return any(re.match("ring|startrail|auto", name) for name in self.names)

    @property
    def is_startrail(self) -> bool:
        return any(name.startswith("startrail") for name in self.names)

    @property
    def predicted(self) -> dict[str, float]:
        """Seconds by pass."""
        return {
            "forward": self.estimate.forward.seconds,
            "backward": self.estimate.backward.seconds,
        }


def wanted(layout: Layout, call: Call, cluster: Cluster) -> list[Wanted]:
    """Every named plan, then `auto`, and the best that keeps nothing for backward if auto does.

    A plan that is named and chosen is one plan with two names.
    """
    training = call.training(layout.ranks)
    names: dict[Plan, list[str]] = {}
    for name, context in named_points(layout.ranks, call.heads, call.kv_heads).items():
        names.setdefault(Plan(kind="train", cp=context), []).append(name)
    choices = [choice.plan for choice in rank_plans(training, cluster).choices]
    names.setdefault(choices[0], []).append("auto")
    if choices[0].cp.schedule.keep != "none":
        lean = next(plan for plan in choices if plan.cp.schedule.keep == "none")
        names.setdefault(lean, []).append("auto, keep none")
    return [
        Wanted(tuple(own), plan, estimate(training, cluster, plan)) for plan, own in names.items()
    ]


def interface_bytes(plan: Plan, call: Call, layout: Layout) -> dict[str, int]:
    """By pass: bytes through the busiest way of the busiest node's interface, in or out."""
    loads = {name: Counter[tuple[str, int]]() for name in PASSES}
    for world in range(layout.ranks):
        done = schedule(plan.cp, call.of(plan.cp, axes.position(world, "cp", plan.sizes)))
        for name, load in loads.items():
            for move in done.moves((name,)):
                peers = axes.peers(world, move.axis, plan.sizes)
                here = layout.node_of[world]
                for position, rows in move.sends.items():
                    there = layout.node_of[peers[position]]
                    if there != here:
                        load["out", here] += move.row_bytes * rows.rows
                        load["in", there] += move.row_bytes * rows.rows
    return {name: max(load.values(), default=0) for name, load in loads.items()}


def kernel_seconds(context: Context, call: Call, flop_rate: float) -> dict[str, float]:
    """By pass: seconds that the busiest rank's kernels sleep."""
    pairs = max(
        schedule(context, call.of(context, rank)).pair_count() for rank in range(context.degree)
    )
    kernel = kernel_of(flop_rate)
    flops = 4.0 * call.head_dim * (call.heads // context.ulysses) * pairs
    back = attention.BACKWARD_FLOPS * flops
    return {"forward": flops / kernel.forward, "backward": back / kernel.backward}
