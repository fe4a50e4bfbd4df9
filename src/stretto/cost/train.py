"""What a training step costs under a plan that splits sequences: seconds, bytes, memory.

Only what the choice of an attention plan needs: attention by the model of `cost.attention`, other
layers by their FLOP. The exchange of weights is the same under all plans of equal ranks, and left
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from stretto.cluster.model import Cluster
from stretto.cost import attention
from stretto.cost.attention import Pass
from stretto.cost.attention_bytes import Call, terms, total
from stretto.cost.attention_links import Fabric, fabric_of, load_of
from stretto.cost.attention_memory import Memory, memory_of
from stretto.cost.attention_work import step_pairs
from stretto.errors import PlanMismatch
from stretto.plan.checks import check_trains, divisors
from stretto.plan.context import Context, settled
from stretto.plan.model import Plan
from stretto.plan.ranges import Mask
from stretto.workload.train import Training

PHASES = ("attention forward", "attention backward", "layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainEstimate:
    """What one optimizer step under a plan is expected to cost. Never more than a projection.

    `phases`: seconds by phase. `interval`: with all messages hidden under kernels, and with none.
    `forward`, `backward`: one attention of one layer, of a micro-batch. `calls`: how many of them
    a rank makes each way. `sent_bytes`: attention's, by the rank that
    sends most, whole step; `link_bytes`: of all ranks, by link class. `interface_bytes`: through
    the busiest network interface. `room`: memory that the smallest device allows.
    """

    plan: Plan
    phases: dict[str, float]
    interval: tuple[float, float]
    forward: Pass
    backward: Pass
    calls: int
    sent_bytes: int
    link_bytes: dict[str, int]
    interface_bytes: int
    memory: Memory
    room: int
    basis: str = "projected"

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def attention_seconds(self) -> float:
        return self.phases["attention forward"] + self.phases["attention backward"]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def bottleneck(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    def as_dict(self) -> dict:
        """Plain data for a result file."""
        return {
            "plan": str(self.plan),
            "basis": self.basis,
            "seconds": self.seconds,
            "interval": list(self.interval),
            "phases": dict(self.phases),
            "attention_calls": self.calls,
            "sent_bytes_per_rank": self.sent_bytes,
            "link_bytes": dict(self.link_bytes),
            "busiest_interface_bytes": self.interface_bytes,
            "memory": self.memory.as_dict(),
            "memory_bytes": self.memory.total,
            "room_bytes": self.room,
            "fits": self.fits,
            "bottleneck": self.bottleneck,
        }


def mask_of(training: Training) -> Mask:
    """Which keys a token sees."""
    arch = training.arch
    return Mask(causal=arch.causal, window=training.seen, documents=training.documents)


def bound(training: Training, context: Context) -> Context:
    """The plan as a model is bound to it: one layout for all layers, which no window changes."""
    return settled(context, causal=training.arch.causal, documents=training.documents)


def call_of(training: Training, context: Context, micro_batch: int = 1) -> Call:
    """One attention of `micro_batch` sequences; of uneven shards, of the longest."""
    arch, rows = training.arch, -(-training.tokens // context.degree)
    heads = (arch.heads, arch.kv_heads, arch.head_dim)
    return Call(micro_batch, rows, rows, *heads, training.item_bytes, training.scalar_bytes)


def calls_of(training: Training, plan: Plan) -> int:
    """Attention calls of a rank in one step: a call takes all sequences of a micro-batch."""
    return training.arch.layers * training.sequences // (plan.dp.degree * plan.dp.micro_batch)


def estimate(training: Training, cluster: Cluster, plan: Plan) -> TrainEstimate:
    """What `plan` costs on `cluster`, projected.

    Bytes are the closed forms of equal shards without pruning: a bound for masks that hide blocks.
    Raises PlanMismatch: more ranks than devices, heads or sequences that do not split;
    ConfigError: a dtype whose rate the cluster does not know.
    """
    check(training, cluster, plan)
    context, sizes = plan.cp, plan.sizes
    used = cluster.first(plan.world_size)
    fabric = fabric_of(used)
    call = call_of(training, context, plan.dp.micro_batch)
    calls = calls_of(training, plan)
    passes = [_slowest_pass(training, used, plan, call, back=back) for back in (False, True)]
    layers = _layer_seconds(training, used)
    phases = [calls * each.seconds for each in passes]
    rooms = [used.device(rank).memory for rank in range(used.size)]
    bytes_of = _Bytes.of(context, call, sizes, fabric)
    return TrainEstimate(
        plan=plan,
        phases=dict(zip(PHASES, (*phases, layers), strict=True)),
        interval=(
            layers + calls * sum(each.least for each in passes),
            layers + calls * sum(each.most for each in passes),
        ),
        forward=passes[0],
        backward=passes[1],
        calls=calls,
        sent_bytes=calls * bytes_of.sent,
        link_bytes={name: calls * count for name, count in bytes_of.links.items()},
        interface_bytes=calls * bytes_of.interface,
        memory=memory_of(training, context, call, plan.world_size // plan.dp.replicate),
        room=int(training.limits.memory_fraction * min(rooms)),
    )


def check(training: Training, cluster: Cluster, plan: Plan) -> None:
    """Raise PlanMismatch unless the plan's ranks, heads and sequences fit."""
    if plan.world_size > cluster.size:
        raise PlanMismatch(
            f"{plan} for {cluster.size} device(s) of {cluster.name}\n"
            "  why: each rank has a device of its own\n"
            f"  to fix: degrees whose product is at most {cluster.size}"
        )
    check_trains(plan)
    if training.sequences % plan.dp.degree:
        legal = [n for n in range(1, training.sequences + 1) if training.sequences % n == 0]
        raise PlanMismatch(
            f"dp of {plan.dp.degree} does not divide the {training.sequences} sequences of a step\n"
            f"  to fix: one of {', '.join(map(str, legal))}"
        )
    each = training.sequences // plan.dp.degree
    if each % plan.dp.micro_batch:
        legal = ", ".join(map(str, divisors(each)))
        raise PlanMismatch(
            f"micro-batches of {plan.dp.micro_batch} do not divide the {each} sequences of each of "
            f"{plan.dp.degree} data rank(s)\n"
            f"  to fix: one of {legal}"
        )
    plan.cp.check_heads(training.arch.heads, training.arch.kv_heads)


def _slowest_pass(training: Training, used: Cluster, plan: Plan, call: Call, *, back: bool) -> Pass:
    """One attention on the device kind on which it takes longest."""
    context, sizes = plan.cp, plan.sizes
    pairs = step_pairs(bound(training, context), training.tokens, mask_of(training))
    found = []
    for name in sorted({kind for _, kind in used.places}):
        kernel = attention.kernel_of(used.devices[name], training.dtype)
        kernels = attention.kernel_seconds(context, call, kernel, pairs, back=back)
        settings = {"back": back, "copy_rate": used.devices[name].memory_rate}
        found.append(attention.pass_of(context, call, kernels, fabric_of(used), sizes, **settings))
    return max(found, key=lambda each: each.seconds)


def _layer_seconds(training: Training, used: Cluster) -> float:
    """All matrices but attention's products, forward, backward, recomputed; on even ranks."""
    arch = training.arch
    each = arch.layers * arch.layer_parameters * (8 if training.recompute else 6)
    flops = (each + 6 * arch.head_parameters) * training.tokens * training.sequences / used.size
    rate = min(used.device(rank).flop_rate(training.dtype) for rank in range(used.size))
    return flops / (rate * training.efficiency)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes of one attention forward and backward: per rank, by link class, busiest interface."""

    sent: int
    links: dict[str, int]
    interface: int

    @classmethod
    def of(cls, context: Context, call: Call, sizes: Mapping[str, int], fabric: Fabric) -> _Bytes:
        links: Counter[str] = Counter()
        interface = sent = 0
        for back in (False, True):
            found = terms(context, call, back=back)
            sent += total(found, context)
            for term in found:
                load, each = load_of(term, sizes, fabric), term.message * term.times
                links["between nodes"] += load.crossing * each
                links["in node"] += (load.all_ranks - load.crossing) * each
                interface += load.network * each
        return cls(sent, dict(links), interface)
