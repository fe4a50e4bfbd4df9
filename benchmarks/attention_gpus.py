"""Attention over the GPUs of one host: every plan that fits, beside one GPU and torch's own.

torchrun --standalone --nproc-per-node N benchmarks/attention_gpus.py --out x.json [--dry]

links   what `stretto probe` measures, per carrier, rates of the attention kernels, and what those
        lose to messages beside them: the cluster that `auto` chooses on and that every prediction
        uses, written beside the result.
gate    every plan and carrier at a small size against float32, before anything is timed.
mha     32 query and 32 key heads of 128, causal, bf16: forward and backward of every named plan
        that N ranks allow and of `auto`, over both carriers, beside one GPU alone.
gqa     the same with 8 key heads.
peers   torch's `context_parallel` (cuDNN, its load balancing on, sharding outside the timing, both
        ways to pass blocks on) in turns with the best plan of ours and one GPU. Apart from the
        rest, because what it breaks must not cost rows.
long    256k and 512k tokens, the plans in `--long-plans`.

A time is that of the slowest rank between device events, entrants taking turns; `kernels_ms` is the
same plan with messages left out, `exposed_ms` what is above it. Bytes are counted by a mesh and
compared with what the plan declares. Rank 0 writes the result after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import displaced
import job
import result
import torch
from job import Axes, Rank, Stamps, median, slowest
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn import functional

from stretto.cli.probe import describe
from stretto.cluster.model import Cluster, Kernel
from stretto.cost.fit import fit_link
from stretto.cost.train import estimate
from stretto.mesh import probe
from stretto.mesh.count import CountingMesh
from stretto.mesh.join import init_mesh
from stretto.mesh.mesh import Mesh, Pending
from stretto.ops.attention import backends, naive
from stretto.ops.attention.dist import attention
from stretto.ops.attention.layout import take
from stretto.plan.context import AttentionCase, Context, named_points
from stretto.plan.model import Plan
from stretto.plan.ranges import Mask
from stretto.search.attention import rank_plans
from stretto.workload.arch import Arch
from stretto.workload.train import Training

SECTIONS = ("links", "gate", "mha", "gqa", "peers", "long")
#: Families of named plans, to say which do not exist for a number of ranks.
FAMILIES = ("ring", "usp", "ulysses", "startrail", "tile", "kv-allgather")
ONE, AUTO, OWN_RING = "one GPU", "auto", "ring, ours"
CAUSAL = Mask(causal=True)
TIMEOUT_S = 120.0
#: FLOP/s of forward and backward that estimates of running time assume of a GPU.
EXPECTED_RATE = 450e12
#: Allowed error beside one device's own in the same dtype.
ALLOWED = 1.5
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One attention call. `groups`: key heads."""

    section: str
    tokens: int
    heads: int
    groups: int
    dim: int

    @property
    def who(self) -> str:
        return f"{self.section}/{self.tokens}"

    @property
    def flops(self) -> float:
        """Forward and backward, causal: seven products of N^2 / 2 x D per head."""
        return 7.0 * self.tokens**2 * self.dim * self.heads

    def of(self, context: Context, rank: int, item_bytes: int) -> AttentionCase:
        heads = (self.heads, self.groups)
        sizes = {"tokens": self.tokens, "heads": heads, "head_dim": self.dim}
        return AttentionCase.of(context, **sizes, item_bytes=item_bytes, mask=CAUSAL, rank=rank)


@dataclass
class Entrant:
    """One way to compute a case. `work(stamps)` stamps after forward and after backward.

    `alone`: rank 0 only. `silent`: the same kernels without messages. `around`: entered outside
    the timing.
    """

    who: str
    work: Callable[[Stamps], None]
    carrier: str = ""
    context: Context | None = None
    silent: Callable[[Stamps], None] | None = None
    alone: bool = False
    around: Callable[[], Any] = contextlib.nullcontext
    facts: dict[str, Any] = field(default_factory=dict)


class Silent(CountingMesh):
    """A mesh whose exchanges send nothing: what arrives is whatever the memory held."""

    def exchange(self, sends, receives, axis, phase, *, verb="exchange", channel=0):
        self.copy_own(sends, receives, axis)
        return Pending(lambda: dict(receives))


class Bench(Rank):
    """The ranks, their sizes, their meshes, and what rank 0 has measured so far."""

    def __init__(self, options: argparse.Namespace):
        device = job.local_device(options.dry)
        ranks = int(os.environ["WORLD_SIZE"])
        world = init_mesh(Axes({"step": ranks}), device=device, timeout_s=600.0)
        super().__init__(options, world)
        small = options.dry
        self.dtype = torch.float32 if small else torch.bfloat16
        self.heads, self.dim = (4 * ranks, 16) if small else (32, 128)
        self.carriers = ("gloo",) if small else tuple(options.carriers)
        self.meshes: dict[tuple, Mesh] = {}
        self.clusters: dict[str, Cluster] = {}
        #: What the gate found wrong, by carrier.
        self.wrong: set[tuple[str, Context]] = set()
        #: Inputs of the case at hand; plans that give a rank as many rows share them.
        self.inputs: dict[tuple, tuple[list[Tensor], Tensor]] = {}
        words = job.device_words(device, ranks)
        self.result = result.begin("attention/gpus", words, options.commit)
        self.result |= {"command": job.command(ranks), "ranks": ranks, "skipped": []}
        self.result["notes"] = NOTES

    def mesh(self, context: Context, carrier: str) -> Mesh:
        """The mesh of a plan's axes; plans of equal sizes share it."""
        sizes = Plan(kind="train", cp=context).sizes
        key = (carrier, *sizes.items())
        if key not in self.meshes:
            carried = "auto" if carrier == "gloo" else carrier
            more = {"device": self.device, "timeout_s": TIMEOUT_S, "carrier": carried}
            self.meshes[key] = init_mesh(Axes(sizes), **more)
        return self.meshes[key]

    def write(self) -> None:
        if self.rank == 0:
            self.result["summary"] = summary(self.result)
            result.write(self.options.out, self.result)

    def skip(self, who: str, why: str) -> None:
        self.say(f"skipped: {who}: {why}")
        self.result["skipped"].append({"who": who, "why": why})

    def cases(self, section: str) -> list[Case]:
        lengths = {"long": self.options.long}.get(section, self.options.tokens)
        if self.options.dry:
            lengths = [16 * self.ranks]
        groups = self.heads // 4 if section == "gqa" else self.heads
        return [Case(section, tokens, self.heads, groups, self.dim) for tokens in lengths]


# ---- entrants ------------------------------------------------------------------------------------


def plans(bench: Bench, case: Case, carrier: str) -> dict[str, Context]:
    """Every named plan for these ranks and heads, our ring, and what `auto` chooses."""
    found = {
        name: point
        for name, point in named_points(bench.ranks, case.heads, case.groups).items()
        if not name.startswith("double-ring")
    }
    found[OWN_RING] = Context(ring=bench.ranks)
    if carrier in bench.clusters:
        found[AUTO] = chosen(bench, case, carrier)
        if found[AUTO] == found[OWN_RING]:
            # One measurement is enough.
            del found[OWN_RING]
    asked = bench.options.long_plans if case.section == "long" else bench.options.plans
    return {
        name: point
        for name, point in found.items()
        if (not asked or name in asked or name.split("(")[0] in asked)
        and (carrier, point) not in bench.wrong
    }


def absent(bench: Bench) -> None:
    """Say by name which families these ranks have no member of."""
    names = named_points(bench.ranks, bench.heads, bench.heads)
    for family in FAMILIES:
        if not any(name.split("(")[0] == family for name in names):
            bench.skip(family, f"{bench.ranks} ranks allow no degree of it between 1 and all")


def training(bench: Bench, case: Case) -> Training:
    """The call as one layer, for estimates: attention's own, nothing else counts."""
    arch = Arch(
        name="attention alone",
        layers=1,
        width=case.heads * case.dim,
        heads=case.heads,
        kv_heads=case.groups,
        head_dim=case.dim,
        feed_forward=1,
        vocab=0,
    )
    dtype = "bf16" if bench.dtype == torch.bfloat16 else "fp32"
    return Training.of(arch, case.tokens, dtype=dtype, state_bytes=0, recompute=False)


def chosen(bench: Bench, case: Case, carrier: str) -> Context:
    """What `auto` means on the probed cluster of a carrier."""
    cluster = bench.clusters[carrier]
    return rank_plans(training(bench, case), cluster, ranks=bench.ranks).best.cp


def predicted_ms(bench: Bench, case: Case, context: Context, carrier: str) -> float | None:
    if carrier not in bench.clusters:
        return None
    plan = Plan(kind="train", cp=context)
    found = estimate(training(bench, case), bench.clusters[carrier], plan)
    return 1e3 * (found.forward.seconds + found.backward.seconds)


def entrant(bench: Bench, case: Case, name: str, context: Context, carrier: str) -> Entrant:
    """A plan of ours over a carrier, with inputs of its own rows."""
    mesh = bench.mesh(context, carrier)
    shape = case.of(context, mesh.rank("cp"), bench.dtype.itemsize)
    inputs, dout = inputs_of(bench, case, shape.q_rows[shape.rank].rows)

    def on(carried: Mesh) -> Callable[[Stamps], None]:
        def work(stamps: Stamps) -> None:
            out = attention(*inputs, mesh=carried, plan=context, causal=True, tokens=case.tokens)
            stamps.stamp()
            torch.autograd.grad(out, inputs, dout)
            stamps.stamp()

        return work

    found = Entrant(f"{case.who}/{carrier}/{name}", on(mesh), carrier, context, on(Silent(mesh)))
    found.facts = {"plan": context.short(), "name": name, "carrier": carrier}
    found.facts |= counted(context, shape, mesh, on)
    return found


def counted(context: Context, shape: AttentionCase, mesh: Mesh, on: Callable) -> dict[str, Any]:
    """Bytes that this rank sends, as a mesh counts them and as the plan declares them."""
    # Every kernel is loaded without messages first: one that loads behind a kernel that waits for
    # a peer on the device would wait for ever.
    on(Silent(mesh))(Stamps(mesh.device))
    result.synchronise(mesh.device)
    counting = CountingMesh(mesh)
    on(counting)(Stamps(mesh.device))
    declared = context.wire(shape)
    by_phase = {lane.phase: n for lane, n in counting.traffic}
    return {
        "bytes_sent": counting.traffic.total(),
        "bytes_by_phase": by_phase,
        "bytes_match": counting.traffic == declared,
    }


def inputs_of(bench: Bench, case: Case, rows: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and a gradient of as many rows."""
    key = (case, rows)
    if key not in bench.inputs:
        counts = (case.heads, case.groups, case.groups, case.heads)
        *inputs, dout = (drawn(bench, rows, count, case.dim) for count in counts)
        bench.inputs[key] = ([x.requires_grad_() for x in inputs], dout)
    return bench.inputs[key]


def drawn(bench: Bench, rows: int, heads: int, dim: int) -> Tensor:
    """(1, H, rows, D), in memory as a projection leaves it: rows outermost."""
    shape = (1, rows, heads, dim)
    return torch.randn(shape, device=bench.device, dtype=bench.dtype).transpose(1, 2)


def one_gpu(bench: Bench, case: Case) -> Entrant:
    """torch's own attention on rank 0, over the whole sequence, contiguous.

    Its inputs are made for every run, outside the timing: other plans need the memory.
    """
    inputs: list[Tensor] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        counts = (case.heads, case.groups, case.groups, case.heads)
        if bench.rank == 0:
            inputs[:] = (drawn(bench, case.tokens, n, case.dim).contiguous() for n in counts)
        try:
            yield
        finally:
            inputs.clear()

    def work(stamps: Stamps) -> None:
        sdpa(inputs, stamps)

    facts = {"name": ONE, "plan": "sdpa"}
    return Entrant(f"{case.who}/{ONE}", work, alone=True, around=around, facts=facts)


def sdpa(inputs: Sequence[Tensor], stamps: Stamps) -> None:
    """torch's scaled_dot_product_attention, forward and backward; on GPUs with cuDNN."""
    q, k, v, dout = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with kernels(q.device):
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = functional.scaled_dot_product_attention(*leaves, is_causal=True, **gqa)
        stamps.stamp()
        torch.autograd.grad(out, leaves, dout)
    stamps.stamp()


def kernels(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch_attention.sdpa_kernel([torch_attention.SDPBackend.CUDNN_ATTENTION])


# ---- times ---------------------------------------------------------------------------------------


def repeats_for(bench: Bench, case: Case) -> int:
    """Fewer where one call takes long."""
    expected = case.flops / EXPECTED_RATE / bench.ranks
    for limit, count in ((0.2, bench.options.repeats), (0.8, 5), (3.0, 3)):
        if expected < limit:
            return min(count, bench.options.repeats)
    return 2


def expected_s(bench: Bench, case: Case, plans_per_carrier: int) -> float:
    """What a case will take: warm and counted once each, timed, and half as often silent."""
    if bench.options.dry:
        return 1.0
    repeats, one = repeats_for(bench, case), case.flops / EXPECTED_RATE
    each = one / bench.ranks * 1.4
    entrants = plans_per_carrier * len(bench.carriers)
    return 3.0 + entrants * each * (3 + 1.5 * repeats) + one * (repeats + 1)


def timed(bench: Bench, entrants: Sequence[Entrant], repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of all entrants, in turns, of the slowest rank; after one warming round."""
    peaks = {e.who: peak(bench, e) for e in entrants}
    times: dict[str, list[list[float]]] = {e.who: [] for e in entrants}
    silent: dict[str, list[list[float]]] = {e.who: [] for e in entrants if e.silent}
    counts = {e.who: calls(bench, e) for e in entrants}
    for turn in range(repeats):
        for each in entrants[:: 1 if turn % 2 == 0 else -1]:
            times[each.who].append(once(bench, each, each.work, counts[each.who]))
            if each.silent and turn % 2 == 0:
                silent[each.who].append(once(bench, each, each.silent, counts[each.who]))
    found = {}
    for each in entrants:
        every = bench.collect([times[each.who], silent.get(each.who, []), peaks[each.who]])
        taken = [e for e in every if not each.alone][: bench.ranks] or every[:1]
        found[each.who] = {
            "ms": slowest([[sum(pair) for pair in rank[0]] for rank in taken]),
            "forward_ms": median(slowest([[pair[0] for pair in rank[0]] for rank in taken])),
            "kernels_ms": slowest([[sum(pair) for pair in rank[1]] for rank in taken]),
            "peak_bytes": max(rank[2] for rank in taken),
        }
    return found


def once(bench: Bench, each: Entrant, work: Callable, count: int) -> list[float]:
    """Milliseconds per call of forward and of backward, over `count` calls back to back."""
    with each.around():
        bench.barrier()
        if each.alone and bench.rank:
            return [0.0, 0.0]
        stamps = Stamps(bench.device)
        stamps.stamp()
        for _ in range(count):
            work(stamps)
        parts = stamps.milliseconds()
    return [sum(parts[0::2]) / count, sum(parts[1::2]) / count]


def calls(bench: Bench, each: Entrant) -> int:
    """Calls back to back, as layers of a model make them; the same on all ranks.

    They outlast what ranks differ in when they leave a barrier, and the host is ahead of the device
    from the second on, for every entrant.
    """
    mine = sum(once(bench, each, each.work, 1))
    slow = max(bench.collect(mine))
    return 1 if bench.options.dry else max(1, min(10, math.ceil(100.0 / max(slow, 0.1))))


def peak(bench: Bench, each: Entrant) -> int:
    """Bytes that a call needs at most, beyond what is there before it; warms it up, too."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    once(bench, each, each.work, 1)
    if each.silent:
        once(bench, each, each.silent, 1)
    if bench.device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() - before


def rows(bench: Bench, case: Case, entrants: Sequence[Entrant]) -> Iterator[dict[str, Any]]:
    """One row per entrant, with its ratios and its prediction."""
    found = timed(bench, entrants, repeats_for(bench, case))
    alone = median(found[entrants[0].who]["ms"])
    shape = {"tokens": case.tokens, "heads": [case.heads, case.groups], "head_dim": case.dim}
    for each in entrants:
        own = found[each.who]
        bytes_of = bench.collect([each.facts.get("bytes_sent"), each.facts.get("bytes_match")])
        row = {"who": each.who, "section": case.section, **shape, **each.facts, **own}
        ms = median(own["ms"])
        row |= {"median_ms": ms, "spread": result.spread(own["ms"]), "over_one_gpu": alone / ms}
        row["tflops_per_gpu"] = case.flops / (1e9 * ms) / (1 if each.alone else bench.ranks)
        if each.context is not None:
            row |= exposed(own, ms)
            row["bytes_sent"] = [sent for sent, _ in bytes_of]
            row["bytes_match"] = all(match for _, match in bytes_of)
            row |= against(predicted_ms(bench, case, each.context, each.carrier), ms)
        yield row


def exposed(own: dict[str, Any], ms: float) -> dict[str, float]:
    """Time above that of the kernels alone."""
    bare = median(own["kernels_ms"])
    return {"exposed_ms": ms - bare, "exposed_percent": 100 * (ms - bare) / ms}


def against(predicted: float | None, ms: float) -> dict[str, Any]:
    """The model's figure beside the measured one; positive: it took longer than predicted."""
    if predicted is None:
        return {"predicted_ms": None, "model_error_percent": None}
    return {"predicted_ms": predicted, "model_error_percent": 100 * (ms - predicted) / predicted}


# ---- sections ------------------------------------------------------------------------------------


def gate(bench: Bench) -> None:
    """Every plan and carrier at a small size; what is wrong is not timed."""
    tokens = 16 * bench.ranks if bench.options.dry else 2048
    for groups in (bench.heads, bench.heads // 4):
        case = Case("gate", tokens, bench.heads, groups, bench.dim)
        whole = Whole(bench, case)
        for carrier in bench.carriers:
            for name, context in tested(bench, case, carrier).items():
                row = {"who": f"gate/{carrier}/{bench.heads}:{groups}/{name}", "ms": []}
                row |= compared(bench, case, whole, context, carrier)
                bench.result["rows"].append(row)
                if not row["ok"]:
                    bench.wrong.add((carrier, context))
        bench.write()
    wrong = [row["who"] for row in bench.result["rows"] if not row.get("ok", True)]
    bench.say(f"gate: {len(bench.result['rows'])} plans, wrong: {wrong or 'none'}")
    for who in wrong:
        bench.skip(who, "wrong results, so it is not timed")


def tested(bench: Bench, case: Case, carrier: str) -> dict[str, Context]:
    """The plans of a case, and what `auto` will mean at the lengths that are timed."""
    found = plans(bench, case, carrier)
    for section in ("mha", "gqa", "peers", "long"):
        if carrier in bench.clusters and section in bench.options.sections:
            for each in bench.cases(section):
                timed_case = replace(each, groups=case.groups)
                context = chosen(bench, timed_case, carrier)
                if context not in found.values():
                    found[f"{AUTO} at {each.tokens}"] = context
    return found


class Whole:
    """Inputs of a case on every rank, exact results, and what one device makes of them."""

    def __init__(self, bench: Bench, case: Case):
        generator = torch.Generator().manual_seed(case.tokens + case.groups)
        counts = (case.heads, case.groups, case.groups, case.heads)
        draws = [
            torch.randn((1, n, case.tokens, case.dim), generator=generator).to(bench.dtype)
            for n in counts
        ]
        self.inputs = [x.to(bench.device) for x in draws]
        wide = torch.float64 if bench.dtype == torch.float32 else torch.float32
        self.exact = self._exact(wide, case)
        leaves = [x.requires_grad_() for x in self.inputs[:3]]
        gqa = {"enable_gqa": True} if case.groups != case.heads else {}
        with kernels(bench.device):
            out = functional.scaled_dot_product_attention(*leaves, is_causal=True, **gqa)
            grads = torch.autograd.grad(out, leaves, self.inputs[3])
        pairs = zip((out, *grads), self.exact, strict=True)
        self.own = [relative(squares(a, b)) for a, b in pairs]

    def _exact(self, wide: torch.dtype, case: Case) -> list[Tensor]:
        q, k, v, dout = (x.to(wide) for x in self.inputs)
        seen = torch.ones(case.tokens, case.tokens, dtype=torch.bool, device=q.device).tril()
        out, _ = naive.attention(q, k, v, seen)
        return [out, *naive.attention_backward(dout, q, k, v, seen)]


def compared(bench: Bench, case: Case, whole: Whole, context: Context, carrier: str) -> dict:
    """Relative rms errors of a plan over all ranks, beside one device's own."""
    mesh = bench.mesh(context, carrier)
    shape = case.of(context, mesh.rank("cp"), bench.dtype.itemsize)
    rows = shape.q_rows[shape.rank]
    q, k, v, dout = (take(x.detach(), 2, rows) for x in whole.inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    # Without messages first, so that every kernel is loaded before one waits for a peer.
    for carried in (Silent(mesh), mesh):
        out = attention(*leaves, mesh=carried, plan=context, causal=True, tokens=case.tokens)
        grads = torch.autograd.grad(out, leaves, dout)
        result.synchronise(bench.device)
    pairs = zip((out, *grads), whole.exact, strict=True)
    every = bench.collect([squares(a, take(b, 2, rows)) for a, b in pairs])
    sums = [[sum(rank[i][j] for rank in every) for j in (0, 1)] for i in range(len(NAMES))]
    errors = [relative(each) for each in sums]
    floor = torch.finfo(bench.dtype).eps
    ratios = [e / max(own, floor) for e, own in zip(errors, whole.own, strict=True)]
    return {
        "plan": context.short(),
        "errors": dict(zip(NAMES, errors, strict=True)),
        "one_device": dict(zip(NAMES, whole.own, strict=True)),
        "worst_ratio": max(ratios),
        "ok": max(ratios) <= ALLOWED,
    }


def squares(x: Tensor, exact: Tensor) -> list[float]:
    """Sums of squares of the error and of the exact values."""
    x, exact = x.detach(), exact.detach()
    error = x.double() - exact.double()
    return [float(error.square().sum()), float(exact.double().square().sum())]


def relative(sums: Sequence[float]) -> float:
    # NaN fails every comparison, so what is broken has no error that could pass.
    return math.sqrt(sums[0] / sums[1]) if sums[0] == sums[0] else math.inf


def links(bench: Bench) -> None:
    """The machine as `stretto probe` sees it, per carrier, with its attention kernels."""
    kernel = kernel_rates(bench)
    for carrier in bench.carriers:
        mesh = mesh_of_steps(bench, carrier)
        dry = bench.options.dry
        sides = (64,) if dry else (1024, 4096, 8192)
        sizes = (1024, 16384) if dry else tuple(1024 * 4**n for n in range(10))
        found = probe.measure(mesh, sides=sides, message_bytes=sizes)
        fit = fit_link(sent_by_attention(found.messages, dry))
        most = 2**20 if dry else displaced.MOST_BYTES
        lost = displaced.measure(bench, mesh, kernels_beside(bench), fit.rate, most_bytes=most)
        part = displaced.part_displaced(lost, fit.rate)
        probed = describe(found, fit, load=result.load())
        cluster = named(bench, probed, kernel, carrier, displaces=part)
        bench.clusters[carrier] = cluster
        bench.result.setdefault("links", {})[carrier] = {
            "fit": vars(fit),
            "fit_of_all_messages": vars(fit_link(found.messages)),
            "messages": [vars(message) for message in found.messages],
            "products": [{**vars(p), "flop_rate": p.flop_rate} for p in found.products],
            "kernel": kernel.model_dump(mode="json"),
            "displaces": part,
            "beside": [vars(each) for each in lost],
        }
        if bench.rank == 0:
            path = bench.options.out.with_name(f"{bench.options.out.stem}-{carrier}.yaml")
            cluster.write(path)
            bench.result["links"][carrier]["cluster_file"] = path.name
        rate, latency = fit.rate / 1e9, fit.latency * 1e6
        bench.say(
            f"{carrier}: {rate:.0f} GB/s, {latency:.0f} us, fit off by {fit.spread:.0%}; "
            f"kernels beside a message lose {part:.2f} of its time"
        )
    bench.write()


def sent_by_attention(messages: Sequence[probe.Message], dry: bool) -> list[probe.Message]:
    """The verbs that attention sends, by the carrier asked for, at sizes that fill a link."""
    least = 0 if dry else 2**18
    verbs = ("permute", "shift", "all_to_all")
    return [each for each in messages if each.verb in verbs and each.num_bytes >= least]


def mesh_of_steps(bench: Bench, carrier: str) -> Mesh:
    """All ranks along the axis that a probe measures."""
    if carrier != "symmetric":
        return bench.world
    sizes = Axes({"step": bench.ranks})
    return init_mesh(sizes, device=bench.device, timeout_s=TIMEOUT_S, carrier=carrier)


def named(
    bench: Bench, cluster: Cluster, kernel: Kernel, carrier: str, *, displaces: float
) -> Cluster:
    """The probed cluster with the device's real name and memory, and its attention kernels."""
    ((kind, device),) = cluster.devices.items()
    changes: dict[str, Any] = {"attention": kernel}
    name = "CPU"
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        name = properties.name
        changes["memory"] = int(properties.total_memory) // 2**26 * 2**26
    where = f"benchmarks/attention_gpus.py, {bench.ranks} x {name} at once, {cluster.date}"
    changes["source"] = f"measured: {where}"
    devices = {kind: device.model_copy(update=changes)}
    told = f"measured: {where}, {carrier}: permute, shift, all_to_all of 256 KiB to 256 MiB"
    changes = {"source": told, "displaces": displaces}
    links = tuple(link.model_copy(update=changes) for link in cluster.links)
    title = f"{bench.ranks} x {name}, {carrier}"
    return cluster.model_copy(update={"name": title, "devices": devices, "links": links})


def kernel_rates(bench: Bench) -> Kernel:
    """Rates of full rectangles by rows, forward and backward, all GPUs at work."""
    sizes = (32, 64) if bench.options.dry else (512, 1024, 2048, 4096, 8192, 16384)
    backend = backends.choose(bench.device, bench.dtype, bench.dim)
    rates = []
    for size in sizes:
        flops = 4.0 * size**2 * bench.heads * bench.dim
        pair = [repeated(bench, work) for work in full_kernels(bench, size)]
        rates.append((flops / pair[0], 2.5 * flops / pair[1]))
    every = bench.collect(rates)
    slow = [[min(rank[i][j] for rank in every) for j in (0, 1)] for i in range(len(sizes))]
    best = [max(pair[j] for pair in slow) for j in (0, 1)]
    short = tuple(
        (size, round(pair[0] / best[0], 3), round(pair[1] / best[1], 3))
        for size, pair in zip(sizes, slow, strict=True)
    )
    source = f"measured: benchmarks/attention_gpus.py, {backend.name}, {bench.ranks} at once"
    rounded = [float(f"{rate:.4g}") for rate in best]
    return Kernel(forward=rounded[0], backward=rounded[1], short=short, source=source)


def full_kernels(bench: Bench, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of a full rectangle of `size` rows each way, by the chosen back end."""
    backend, scale = backends.choose(bench.device, bench.dtype, bench.dim), bench.dim**-0.5
    q, k, v, dout = (drawn(bench, size, bench.heads, bench.dim).movedim(2, 0) for _ in range(4))
    out, lse = backends.forward(q, k, v, "full", scale, backend)
    given = (dout, q, k, v, out, lse, "full", scale, backend)
    forward = partial(backends.forward, q, k, v, "full", scale, backend)
    return forward, partial(backends.backward, *given)


def kernels_beside(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Kernels at their full rate, of 1 to 2 ms each on an H200, to measure messages beside."""
    rows = (64, 64) if bench.options.dry else (8192, 4096)
    forward, _ = full_kernels(bench, rows[0])
    _, backward = full_kernels(bench, rows[1])
    return {f"forward of {rows[0]} rows": forward, f"backward of {rows[1]} rows": backward}


def repeated(bench: Bench, work: Callable[[], Any], count: int = 5) -> float:
    """Median seconds of a call; enough calls are queued that the host is not measured."""
    for _ in range(3):
        work()
    bench.barrier()
    stamps = Stamps(bench.device)
    stamps.stamp()
    for _ in range(count):
        for _ in range(4):
            work()
        stamps.stamp()
    return median(stamps.milliseconds()) / 4e3


def plain(bench: Bench, section: str) -> None:
    """All plans over all carriers beside one GPU, case by case."""
    for case in bench.cases(section):
        points = {carrier: plans(bench, case, carrier) for carrier in bench.carriers}
        wanted = expected_s(bench, case, max(map(len, points.values())))
        if not bench.may_run(case.who, wanted):
            bench.skip(case.who, f"about {wanted:.0f} s needed, past the budget")
            continue
        bench.say(f"{case.who}: about {wanted:.0f} s")
        entrants = [one_gpu(bench, case)]
        for carrier, found in points.items():
            entrants += [entrant(bench, case, n, c, carrier) for n, c in found.items()]
        take_rows(bench, rows(bench, case, entrants))


def take_rows(bench: Bench, found: Iterator[dict[str, Any]]) -> None:
    for row in found:
        bench.result["rows"].append(row)
        bench.say(line(row))
    bench.inputs.clear()
    bench.write()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    words = f"{row['who']:44} {row['median_ms']:9.2f} ms  {row['over_one_gpu']:5.2f}x"
    words += f"  {row['peak_bytes'] / 2**30:6.2f} GiB"
    if "exposed_ms" in row:
        words += f"  exposed {row['exposed_percent']:5.1f} %"
        if row["predicted_ms"] is not None:
            words += f"  predicted {row['predicted_ms']:9.2f} ({row['model_error_percent']:+.0f} %)"
        words += "" if row["bytes_match"] else "  BYTES DIFFER"
    return words


# ---- torch's context_parallel --------------------------------------------------------------------


def peers(bench: Bench) -> None:
    """torch's context_parallel in turns with our best plan and one GPU; failures are rows."""
    if bench.device.type != "cuda":
        bench.skip("context_parallel", "wants GPUs: its kernels exist for CUDA only")
    for name, groups in (("peers", bench.heads), ("peers-gqa", bench.heads // 4)):
        for each in bench.cases("peers"):
            case = replace(each, section=name, groups=groups)
            wanted = expected_s(bench, case, 3)
            if bench.may_run(case.who, wanted):
                take_rows(bench, rows(bench, case, beside_torch(bench, case)))
            else:
                bench.skip(case.who, f"about {wanted:.0f} s needed, past the budget")


def beside_torch(bench: Bench, case: Case) -> list[Entrant]:
    """One GPU, our favourites, and torch's own."""
    entrants = [one_gpu(bench, case)]
    for name, carrier, context in favourites(bench, case):
        entrants.append(entrant(bench, case, name, context, carrier))
    return entrants + (theirs(bench, case) if bench.device.type == "cuda" else [])


def favourites(bench: Bench, case: Case) -> list[tuple[str, str, Context]]:
    """The fastest row of ours in this case so far, and `auto` of its carrier; else our ring."""
    section = "mha" if case.groups == case.heads else "gqa"
    known = [
        row
        for row in bench.result["rows"]
        if row.get("section") == section and row["tokens"] == case.tokens and "exposed_ms" in row
    ]
    best = min(known, key=lambda row: row["median_ms"], default=None)
    name, carrier = (best["name"], best["carrier"]) if best else (OWN_RING, bench.carriers[0])
    # Rank 0's rows decide: medians are the same everywhere, so all ranks choose alike.
    points = plans(bench, case, carrier)
    names = dict.fromkeys(n for n in (name, AUTO) if n in points)
    return [(n, carrier, points[n]) for n in names]


def theirs(bench: Bench, case: Case) -> list[Entrant]:
    """Both ways in which it passes blocks on; one that does not run here is a row saying why."""
    found = []
    for way in ("allgather", "alltoall"):
        who, words = f"{case.who}/context_parallel({way})", ""
        try:
            made = context_parallel(bench, case, way)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its row
            words = f"{type(error).__name__}: {str(error)[:300]}"
            traceback.print_exc()
        every = [told for told in bench.collect(words) if told]
        if every:
            bench.skip(who, every[0])
            bench.result["rows"].append({"who": who, "ms": [], "error": every[0]})
        else:
            found.append(made)
    return found


def context_parallel(bench: Bench, case: Case, way: str) -> Entrant:
    """Shards made by it before any timing, its context entered anew for every timed run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import experimental
    from torch.distributed.tensor.experimental import _attention

    over = init_device_mesh("cuda", (bench.ranks,))
    _attention.set_rotate_method(way)
    counts = (case.heads, case.groups, case.groups, case.heads)
    whole = [drawn(bench, case.tokens, n, case.dim).contiguous() for n in counts]
    given = {"buffers": whole, "buffer_seq_dims": [2] * 4, "no_restore_buffers": set(whole)}
    with experimental.context_parallel(over, **given):
        # Resized in place, so the shards would hold on to the memory of the whole.
        shards = [x.detach().clone() for x in whole]
    del whole, given

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        _attention.set_rotate_method(way)
        token = torch.zeros(1, 1, 2 * bench.ranks, 1, device=bench.device)
        with experimental.context_parallel(over, buffers=[token], buffer_seq_dims=[2]):
            yield

    def work(stamps: Stamps) -> None:
        sdpa(shards, stamps)

    name = f"context_parallel({way})"
    found = Entrant(f"{case.who}/{name}", work, around=around)
    found.facts = {"name": name, "plan": f"torch {torch.__version__}", "carrier": "nccl"}
    once(bench, found, work, 1)
    return found


# ---- summary -------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Per case: the best named plan, `auto` beside it, one GPU, and torch's own."""
    timed_rows = [row for row in found["rows"] if "median_ms" in row]
    cases: dict[str, list[dict]] = {}
    for row in timed_rows:
        cases.setdefault(f"{row['section']}/{row['tokens']}", []).append(row)
    per_case = {who: of_case(each) for who, each in cases.items()}
    errors = [abs(r["model_error_percent"]) for r in timed_rows if r.get("predicted_ms")]
    autos = [c["auto_within_10pct"] for c in per_case.values() if "auto_within_10pct" in c]
    return {
        "cases": per_case,
        "gate_ok": all(row["ok"] for row in found["rows"] if "ok" in row),
        "bytes_match": all(row["bytes_match"] for row in timed_rows if "exposed_ms" in row),
        "auto_within_10pct": all(autos) if autos else None,
        "model_error_percent_median": median(errors) if errors else None,
        "model_error_percent_worst": max(errors, default=None),
        "errors": [row["who"] for row in found["rows"] if "error" in row],
    }


def of_case(every: Sequence[dict]) -> dict[str, Any]:
    ours = [row for row in every if "exposed_ms" in row]
    named_rows = [row for row in ours if row["name"] != AUTO]
    autos = [row for row in ours if row["name"] == AUTO]
    theirs_rows = [row for row in every if row["name"].startswith("context_parallel")]
    told: dict[str, Any] = {"one_gpu_ms": next(r["median_ms"] for r in every if r["name"] == ONE)}
    best = fastest(named_rows)
    if best:
        told |= {"best_named": best["who"], "best_named_over_one_gpu": best["over_one_gpu"]}
    if autos:
        told["auto_over_one_gpu"] = {r["carrier"]: r["over_one_gpu"] for r in autos}
    near = [r["median_ms"] <= 1.1 * rival(named_rows, r) for r in autos if named_rows]
    if near:
        told["auto_within_10pct"] = all(near)
    if theirs_rows and ours:
        other, own = fastest(theirs_rows), fastest(ours)
        told["context_parallel_over_one_gpu"] = other["over_one_gpu"]
        told["ours_over_context_parallel"] = other["median_ms"] / own["median_ms"]
    return told


def fastest(every: Sequence[dict]) -> dict | None:
    return min(every, key=lambda row: row["median_ms"], default=None)


def rival(named_rows: Sequence[dict], auto: dict) -> float:
    """The best named plan over the same carrier, which is what `auto` chose among."""
    same = [row["median_ms"] for row in named_rows if row["carrier"] == auto["carrier"]]
    return min(same, default=math.inf)


NOTES = [
    "causal, forward and backward; times of the slowest rank, between device events, in turns, of "
    "one call in at least 100 ms of them back to back",
    "ours takes q, k, v with rows outermost, as projections leave them; torch's own gets them "
    "contiguous in its layout",
    "one GPU: torch's scaled_dot_product_attention with cuDNN over the whole sequence, on rank 0",
    "exposed: above the time of the same plan with its messages left out",
    "ring, ours: gradients go straight to their owner; not listed where auto chose it",
    "auto: the least predicted time on the cluster that this run probed, per carrier; compared "
    "with the best named plan over the same carrier",
]


def run(bench: Bench) -> None:
    absent(bench)
    works: dict[str, Callable[[], None]] = {
        "links": lambda: links(bench),
        "gate": lambda: gate(bench),
        "mha": lambda: plain(bench, "mha"),
        "gqa": lambda: plain(bench, "gqa"),
        "peers": lambda: peers(bench),
        "long": lambda: plain(bench, "long"),
    }
    announce(bench)
    for section in SECTIONS:
        if section in bench.options.sections:
            works[section]()
    bench.write()
    bench.say("done")


def announce(bench: Bench) -> None:
    """Estimated seconds, before anything starts."""
    bench.say(f"{bench.result['device']}, budget {bench.options.budget_s:g} s")
    for section in bench.options.sections:
        if section in ("gate", "links"):
            bench.say(f"  {section:6} about {30 if section == 'links' else 15} s")
            continue
        count = {"peers": 3, "long": len(bench.options.long_plans)}.get(section, 7)
        cases = bench.cases(section)
        each = [f"{case.tokens}: {expected_s(bench, case, count):.0f} s" for case in cases]
        bench.say(f"  {section:6} {', '.join(each)}{', twice' if section == 'peers' else ''}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = job.parser(__doc__, budget_s=480)
    made.add_argument("--sections", type=_listed(SECTIONS), default=list(SECTIONS))
    made.add_argument("--carriers", type=_listed(None), default=["nccl", "symmetric"])
    made.add_argument("--tokens", type=_numbers, default=[2**15, 2**16, 2**17])
    made.add_argument("--long", type=_numbers, default=[2**18, 2**19], help="section long")
    made.add_argument("--plans", type=_listed(None), default=[], help="names or families; all")
    made.add_argument("--long-plans", type=_listed(None), default=["ring", "kv-allgather", AUTO])
    made.add_argument("--repeats", type=int, default=7, help="at most; fewer of long calls")
    options = made.parse_args(arguments)
    if options.dry:
        options.repeats = min(options.repeats, 3)
    return options


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _listed(known: Sequence[str] | None) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        unknown = [word for word in words if known and word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
        return words

    return split


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = Bench(job.started(parse()))
    run(made)
    made.barrier()
    sys.stdout.flush()
    # Communicators of many meshes are left to the end of the process.
    os._exit(0)
