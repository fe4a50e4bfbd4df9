"""Memory of a rank that trains on a split sequence: states, activations, the live column."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.cost.attention_bytes import Call
from stretto.plan.options import Context, Gather, StarTrail
from stretto.workload.train import Training


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank.

    `states`: its share of parameters, gradients and optimizer moments. `weights`: layers that are
    assembled at one time. `saved`: activations of all layers between forward and backward.
    `kept`: keys and values that `keep` leaves with the rank, all layers. `column`: live blocks of
    one attention at its busiest. `logits`: the output and its gradient.
    """

    states: int
    weights: int
    saved: int
    kept: int
    column: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__slots__)

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


def memory_of(training: Training, context: Context, call: Call, ranks: int) -> Memory:
    """Memory of one of `ranks` ranks among which the model's states are spread evenly."""
    arch, item = training.arch, training.item_bytes
    rows = call.batch * call.rows
    # The layer at work and the one that is fetched meanwhile; the head is a unit of its own.
    weights = max(2 * arch.layer_parameters, arch.head_parameters) * item
    return Memory(
        states=training.state_bytes * arch.parameters // ranks,
        weights=weights,
        saved=arch.layers * _saved(training, rows),
        kept=round(arch.layers * kept_blocks(context, call) * call.q_block),
        column=round(peak_blocks(context, call) * call.q_block),
        logits=rows * arch.vocab * (4 + item),
    )


def _saved(training: Training, rows: int) -> int:
    """Bytes one layer saves: its input, q, k, v, out, lse; without recomputation the MLP's too."""
    arch = training.arch
    per_token = arch.width + 2 * (arch.heads + arch.kv_heads) * arch.head_dim
    if not training.recompute:
        per_token += 3 * arch.width + (2 + arch.mlp_matrices) * arch.feed_forward
    return rows * (per_token * training.item_bytes + arch.heads * training.scalar_bytes)


def kept_blocks(context: Context, call: Call) -> float:
    """Blocks of received keys and values that a layer keeps for its backward pass."""
    keep, kv = context.schedule.keep, call.kv_block(context.ulysses) / call.q_block
    if keep == "none" or context.degree == context.ulysses:
        return 0.0
    if isinstance(context.schedule, StarTrail) and context.team > 1:
        circles = keep == "all" and context.schedule.circulate == "kv"
        return kv * (context.ring if circles else context.team)
    if isinstance(context.schedule, Gather) or keep == "all" or not context.two_level:
        return kv * (context.ring - 1)
    return kv * (context.sizes["ring_out"] - 1)


def peak_blocks(context: Context, call: Call) -> float:
    """Live blocks of the busiest moment, forward or backward; sums are wider than the inputs.

    Tile: forward a + 4g + 2a, backward 6a + 14g at two bytes per item; StarTrail the same with all
    keys of a team, and the gathered team until placement ends.
    """
    return max(_forward_blocks(context, call), _backward_blocks(context, call))


def _forward_blocks(context: Context, call: Call) -> float:
    a, kv, wide = context.team, _kv(context, call), _wide(call)
    if isinstance(context.schedule, StarTrail):
        return a * (1 + wide) + 2 * kv + _gathered(context, call)
    return a * (1 + wide) + _buffers(context) * kv


def _backward_blocks(context: Context, call: Call) -> float:
    """Q, dO, surrogate and dQ; keys and values; their gradients leaving, arriving, and summed."""
    a, kv, wide = context.team, _kv(context, call), _wide(call)
    wire = wide if getattr(context.schedule, "grad_wire", "input") == "float32" else 1.0
    rows = (4 + wide) * a
    if isinstance(context.schedule, StarTrail):
        return rows + 2 * kv + max(wide * kv + 2 * kv, _gathered(context, call))
    if isinstance(context.schedule, Gather):
        return rows + kv * (1 + wide + wire)
    return rows + (_buffers(context) + 2 * wide + wire) * kv


def _kv(context: Context, call: Call) -> float:
    """Blocks of the keys and values that a step works on."""
    kv = call.kv_block(context.ulysses) / call.q_block
    if isinstance(context.schedule, StarTrail):
        return kv * context.team
    return kv * context.ring if isinstance(context.schedule, Gather) else kv


def _gathered(context: Context, call: Call) -> float:
    if context.team == 1:
        return 0.0
    return context.team * (2 + call.kv_block(context.ulysses) / call.q_block)


def _wide(call: Call) -> float:
    return call.scalar_bytes / call.item_bytes


def _buffers(context: Context) -> float:
    """Blocks of keys and values at hand: two on a ring, three on a ring of rings."""
    if isinstance(context.schedule, Gather):
        return 1.0
    outer, inner = context.ring // context.inner[1], context.inner[1]
    return (2.0 if context.ring > 1 else 1.0) + (1.0 if min(outer, inner) > 1 else 0.0)
