"""A training step under a plan in words: seconds, phases, exact bytes, hops, memory."""

from __future__ import annotations

from stretto.cluster.model import Cluster
from stretto.cost.attention import Pass
from stretto.cost.attention_bytes import Call, by_phase, terms
from stretto.cost.attention_links import fabric_of
from stretto.cost.attention_traffic import Ledger, Line, ledger
from stretto.cost.train import PHASES, TrainEstimate, bound, calls_of, mask_of
from stretto.plan.model import Plan
from stretto.plan.options import AttentionCase, Context
from stretto.quantities import short
from stretto.workload.train import Training

#: What none of these figures holds.
_WEIGHTS = (
    "  not counted: gathers of weights and sums of gradients over all ranks, the same under every "
    "plan of as many"
)


def case_of(training: Training, context: Context, micro_batch: int = 1) -> AttentionCase:
    """One attention of `micro_batch` sequences of the job, seen from rank 0."""
    arch = training.arch
    return AttentionCase.of(
        bound(training, context),
        tokens=training.tokens,
        batch=micro_batch,
        heads=(arch.heads, arch.kv_heads),
        head_dim=arch.head_dim,
        item_bytes=training.item_bytes,
        mask=mask_of(training),
    )


def bytes_of(training: Training, plan: Plan, cluster: Cluster | None = None) -> Ledger:
    """Exact bytes of one attention; without a cluster as if all ranks shared a node."""
    nodes = fabric_of(cluster).nodes if cluster else (0,) * plan.world_size
    return ledger(plan, case_of(training, plan.cp, plan.dp.micro_batch), nodes)


def render(found: TrainEstimate, training: Training, cluster: Cluster) -> str:
    """The text of `stretto explain` for a training plan on a cluster."""
    low, high = found.interval
    plan = found.plan
    lines = [
        f"{plan} on {cluster.name}",
        f"  {training.model}, {training.sequences} x {training.tokens} tokens, {training.dtype}: "
        f"{short('s', found.seconds)} a step ({short('s', low)} to {short('s', high)}), "
        f"{found.basis} from a {cluster.basis} cluster",
        *_seconds(found),
        *_passes(found),
        *_ledger(bytes_of(training, plan, cluster), found.calls, across=True),
        *_memory(found),
        _WEIGHTS,
        *(f"  note: {each}" for each in warnings(found, training)),
    ]
    return "\n".join(lines)


def without_cluster(training: Training, plan: Plan) -> str:
    """Phases and exact bytes of a plan for a job, where no cluster says what they cost."""
    calls = calls_of(training, plan)
    found = bytes_of(training, plan)
    shape = f"{training.model}, {training.sequences} x {training.tokens} tokens, {training.dtype}"
    peak = f"  peak of the column: {found.peak_blocks:.4g} blocks beside inputs and outputs"
    lines = [str(plan), f"  {shape}", *_ledger(found, calls, across=False), peak, _WEIGHTS]
    return "\n".join(lines)


def outline(plan: Plan) -> str:
    """Phases of a plan in blocks, where nothing is known of the job.

    A block is one rank's queries; with as many key heads as query heads; equal shards.
    """
    context = plan.cp
    # Every rank's heads are whole, and a scalar per row and head rounds to nothing.
    call = Call(1, 1, 1, context.ulysses, context.ulysses, 1 << 10, 2, scalar_bytes=0)
    lines = [str(plan), "  blocks of one rank's queries sent, one key head per query head:"]
    for name, back in (("forward", False), ("backward", True)):
        found = by_phase(terms(context, call, back=back), context)
        total = sum(found.values()) / call.q_block
        parts = [f"{phase} on {axis} {n / call.q_block:.4g}" for (phase, axis), n in found.items()]
        lines.append(f"  {name}: {total:.4g} ({', '.join(parts) or 'nothing'})")
    lines.append("  bytes need --workload or --model with --tokens, seconds a --cluster too")
    return "\n".join(lines)


def difference(found: TrainEstimate, other: TrainEstimate) -> str:
    """Two plans side by side; the last column is second minus first."""
    rows = [(name, found.phases[name], other.phases[name]) for name in PHASES]
    rows.append(("total", found.seconds, other.seconds))
    lines = [f"first:  {found.plan}", f"second: {other.plan}"]
    lines += [f"  {name:<19} {a:>10.4g} s {b:>10.4g} s {b - a:>+10.4g} s" for name, a, b in rows]
    pairs = [
        ("sent per rank", found.sent_bytes, other.sent_bytes),
        ("busiest interface", found.interface_bytes, other.interface_bytes),
        ("memory per rank", found.memory.total, other.memory.total),
    ]
    lines += [f"  {name:<19} {a:>12} B {b:>12} B {b - a:>+12} B" for name, a, b in pairs]
    return "\n".join(lines)


def warnings(found: TrainEstimate, training: Training) -> list[str]:
    """Where this plan is the wrong one, with the numbers."""
    lines = []
    ways = (("forward", found.forward), ("backward", found.backward))
    slow = [name for name, each in ways if each.hops > each.kernels]
    if slow:
        worst = max(ways, key=lambda way: way[1].hops - way[1].kernels)[1]
        lines.append(
            f"links take longer than kernels {' and '.join(slow)}: hops "
            f"{short('s', worst.hops)} against kernels {short('s', worst.kernels)}"
        )
    if not found.fits:
        over = (found.memory.total - found.room) / 2**30
        lines.append(f"does not fit: {over:.2f} GiB more than the {found.room / 2**30:.2f} allowed")
    schedule = found.plan.cp.schedule
    if getattr(schedule, "gradients", "owner") == "ride" and found.plan.cp.ring > 2:
        lines.append("gradients ride the ring and are rounded at every hop, in the wire's dtype")
    if training.tokens % (2 * found.plan.cp.degree):
        lines.append(f"{training.tokens} tokens do not divide evenly: ranks differ by a row")
    return lines


def _seconds(found: TrainEstimate) -> list[str]:
    lines = []
    for name in PHASES:
        part = found.phases[name] / found.seconds if found.seconds else 0.0
        limit = "  <- limits" if name == found.bottleneck else ""
        lines.append(f"  {name:<19} {short('s', found.phases[name]):>10} {part:>6.1%}{limit}")
    return lines


def _passes(found: TrainEstimate) -> list[str]:
    """Where the time of one attention goes."""

    def words(name: str, each: Pass) -> str:
        parts = (each.seconds, each.heads, each.rows, each.walk, each.kernels, each.hops)
        total, heads, rows, walk, kernels, hops = (short("s", part) for part in parts)
        return (
            f"  one attention {name}: {total} = heads {heads} + rows {rows} + walk {walk} "
            f"(kernels {kernels} beside hops {hops})"
        )

    ways = (("forward", found.forward), ("backward", found.backward))
    return [words(name, each) for name, each in ways]


def _ledger(found: Ledger, calls: int, *, across: bool) -> list[str]:
    """Exact bytes per phase of one attention, and the whole step's."""
    head = f"    {'phase':<15} {'verb':<10} {'axis':<9} {'bytes per rank':>27} {'messages':>8}"
    head += f" {'in node, all':>16} {'between nodes':>16}" if across else ""
    lines = [f"  exact bytes of one attention, {found.steps} step(s) of the walk:", head]
    for name, part in (("forward", found.forward), ("backward", found.backward)):
        lines += [_line(line, across=across) for line in part]
        most = sum(line.most for line in part)
        lines.append(f"    {name}: at most {most} bytes per rank")
    least, most = min(found.per_rank), max(found.per_rank)
    sent = f"{calls * least} to {calls * most}" if least < most else f"{calls * most}"
    lines.append(f"  whole step, {calls} attentions: {sent} bytes per rank")
    if across:
        lines += [f"  {name}: {calls * count} bytes" for name, count in found.links.items()]
        busiest = max(found.out_of_node.values(), default=0)
        lines.append(f"  out of the busiest node: {calls * busiest} bytes")
    return lines


def _line(line: Line, *, across: bool) -> str:
    sent = f"{line.most}" if line.least == line.most else f"{line.least} to {line.most}"
    text = f"    {line.phase:<15} {line.verb:<10} {line.axis:<9} {sent:>27} {line.messages:>8}"
    return text + (f" {line.inside:>16} {line.across:>16}" if across else "")


def _memory(found: TrainEstimate) -> list[str]:
    total = found.memory.total
    # Of a tiny model, hundredths of a GiB would all be 0.00.
    unit, size = ("GiB", 2**30) if total >= 2**28 else ("MiB", 2**20)
    counts = {name: count / size for name, count in found.memory.as_dict().items()}
    parts = [f"{name} {count:.2f}" for name, count in counts.items() if count >= 0.005]
    return [
        f"  peak memory: {total / size:.2f} {unit} of {found.room / 2**30:.2f} GiB per rank: "
        + ", ".join(parts)
    ]
