"""Attention on one GPU: back ends against float64, our local path against torch's own, plans.

python benchmarks/attention_kernels.py --out kernels.json [--sections check,path,...] [--dry]

check   every back end, kind of piece, shared heads, strides: outputs and gradients against the
        specification in float64, in units of what plain computations in that dtype are off by.
path    torch's own scaled_dot_product_attention on a back end in turns with our local path on the
        same tensors: `torch` and `ours`, stretto.attention on one rank, on contiguous tensors
        (batch, heads, rows, dim); `torch_rows` and `ours_rows`, pieces -> back end as ranks of a
        mesh call it, on rows-outermost storage. Backward also `through_delta`: rows, forming delta
        and the surrogate first, as ranks must. `layout` is torch_rows over torch. `host_us` is what
        one call takes of the host. `bits_of_torch`: outputs, and dk and dv, are the same bits.
merge   what merging costs in steps of `--step` tokens, forward and backward.
blocks  TFLOP/s against rows per block, as CUDA graphs so that the host is not measured.
plans   what every rank of a named plan computes, on virtual ranks of one GPU: error beside one
        device's own, time, peak memory. Ranks share the GPU, so the time is the sum of their work.

Times are of calls back to back, per call, between device events; medians and extremes of
interleaved repeats. The calls are queued while the device spins, so that none waits for the host;
of `blocks` those named forward and backward are not. A case that fails is a row with its error; one
that no longer fits into `--seconds` is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import result
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn import functional

import stretto
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import Mesh
from stretto.ops.attention import backends, merge, naive
from stretto.ops.attention.backends import Backend
from stretto.ops.attention.merge import accumulators, merge_
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.context import AttentionCase, Context, named_points
from stretto.plan.ranges import Mask, Piece, Spans, pieces
from stretto.testing.close import allowance, distance

SECTIONS = ("check", "merge", "path", "blocks", "plans")
NAMES = ("out", "lse", "dq", "dk", "dv")
#: torch's names of the same kernels.
TORCH = {
    "cudnn": torch_attention.SDPBackend.CUDNN_ATTENTION,
    "flash": torch_attention.SDPBackend.FLASH_ATTENTION,
    "efficient": torch_attention.SDPBackend.EFFICIENT_ATTENTION,
}
#: Of path, and from how many tokens on the summary repeats them.
OVER = {
    "ours_over_torch_percent": ("ours", "torch"),
    "ours_rows_over_torch_rows_percent": ("ours_rows", "torch_rows"),
    "through_delta_over_torch_rows_percent": ("through_delta", "torch_rows"),
    "layout_percent": ("torch_rows", "torch"),
}
LARGE = 16384
#: Of a device that spins while calls are queued: cycles for each, above half a millisecond.
SPIN = 1_000_000
Work = Callable[[], Any]
Row = dict[str, Any]


class Bench:
    """The device, its sizes and the clock of the whole run."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device("cpu" if options.dry else "cuda")
        self.deadline = time.monotonic() + options.seconds
        small = options.dry
        self.names = ("cpu",) if small else tuple(options.backends)
        self.dtype = torch.float32 if small else torch.bfloat16
        self.dim = 16 if small else 128
        self.heads = 4 if small else 32
        self.tokens = (64, 128) if small else tuple(options.tokens)
        self.step = 64 if small else options.step
        self.blocks = (32, 64) if small else (512, 1024, 2048, 4096, 8192, 16384)
        self.repeats = 2 if small else options.repeats
        self.target_ms = 0.0 if small else 6.0

    def backend(self, name: str) -> Backend:
        return backends.choose(self.device, self.dtype, self.dim, name)

    def tensors(self, rows: int, keys: int, groups: int, **more: Any) -> Tensors:
        dtype, dim = more.pop("dtype", self.dtype), more.pop("dim", self.dim)
        heads = more.pop("heads", self.heads)
        return Tensors(self.device, dtype, rows, keys, heads, groups, dim, **more)

    def times(self, works: dict[str, Work], *, waits: bool = False) -> dict[str, list[float]]:
        """Milliseconds per call of every work, interleaved; `waits` lets the device wait for it."""
        return self.measured(works, waits=waits)[0]

    def measured(
        self, works: dict[str, Work], *, waits: bool = False
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """The same, and milliseconds of the host to queue one call, after one warming round."""
        counts = {name: self._count(work, waits) for name, work in works.items()}
        found: dict[str, list[float]] = {name: [] for name in works}
        host: dict[str, list[float]] = {name: [] for name in works}
        names = list(works)
        for index in range(self.repeats):
            first = index % len(names)
            # Everyone goes first, and after everyone: what ran before sets clocks and caches.
            order = [*names[first:], *names[:first]][:: -1 if index // len(names) % 2 else 1]
            for name in order:
                device_ms, host_ms = self._queued(works[name], counts[name], waits)
                found[name].append(device_ms)
                host[name].append(host_ms)
        return found, host

    def _count(self, work: Work, waits: bool) -> int:
        """Calls that keep the device busy for `target_ms`."""
        work()
        once, _ = self._queued(work, 1, waits)
        return max(1, min(20, round(self.target_ms / max(once, 1e-3))))

    def _queued(self, work: Work, count: int, waits: bool) -> tuple[float, float]:
        if self.device.type != "cuda":
            took = result.timed(lambda: [work() for _ in range(count)], self.device)
            return 1e3 * took / count, 1e3 * took / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if not waits:
            torch.cuda._sleep(SPIN * (count + 1))
        begin.record()
        start = time.perf_counter()
        for _ in range(count):
            work()
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / count, 1e3 * host / count


class Tensors:
    """Seeded inputs in storage order (L, B, H, D) and their gradient."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        keys: int,
        heads: int,
        groups: int,
        dim: int,
        batch: int = 1,
    ):
        generator = torch.Generator(device).manual_seed(rows + keys + groups)
        shapes = [(rows, batch, heads, dim)] * 2 + [(keys, batch, groups, dim)] * 2
        draws = (torch.randn(s, generator=generator, device=device) for s in shapes)
        self.dout, self.q, self.k, self.v = (x.to(dtype) for x in draws)
        self.scale = dim**-0.5

    def to(self, dtype: torch.dtype) -> Tensors:
        """The same numbers in another dtype."""
        found = copy.copy(self)
        found.dout, found.q, found.k, found.v = (
            t.to(dtype) for t in (self.dout, self.q, self.k, self.v)
        )
        return found

    def views(self) -> tuple[Tensor, ...]:
        """dout, q, k, v in torch's order of dims (B, H, L, D), as they are stored."""
        return tuple(x.permute(1, 2, 0, 3) for x in (self.dout, self.q, self.k, self.v))

    def sdpa(self) -> tuple[Tensor, ...]:
        """dout, q, k, v in torch's layout (B, H, L, D), contiguous."""
        return tuple(x.contiguous() for x in self.views())


def whole(mask: Mask, rows: int, keys: int) -> tuple[Piece, ...]:
    return pieces(mask, Spans(((0, rows),)), Spans(((0, keys),)))


def flop(rows: int, keys: int, heads: int, dim: int, kind: str, backward: bool) -> float:
    """Multiply-adds count two; a causal square is half; backward is five products, forward two."""
    return (10 if backward else 4) * rows * keys * heads * dim * (1 if kind == "full" else 0.5)


# check


def checks(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    half = (torch.bfloat16, torch.float16)
    table = {
        "cudnn": half,
        "flash": half,
        "efficient": (torch.bfloat16, torch.float32),
        "naive": (torch.float64,),
        "cpu": (torch.float64, torch.float32),
    }
    for name, dtypes in table.items():
        if bench.device.type not in backends.BACKENDS[name].devices:
            continue
        for dtype in dtypes:
            for label, case in shapes(12 if bench.options.dry else 60):
                who = f"check/{name}/{str(dtype)[6:]}/{label}"
                yield who, lambda n=name, d=dtype, c=case: check(bench, n, d, c)
        yield f"check/{name}/empty", lambda n=name, d=dtypes[0]: empty(bench, n, d)
    if bench.device.type == "cuda":
        yield "check/cudnn/other strides", lambda: other_strides(bench)
        yield "check/triton", lambda: triton_rows(bench)
        yield "check/triton/repeated", lambda: merge_repeated(bench)


def shapes(unit: int) -> Iterator[tuple[str, SimpleNamespace]]:
    """Pieces of 5 units of rows, whole and as squares with gaps; single rows and keys."""
    rows, keys, edge = 5 * unit, 5 * unit - 20, (5 * unit - 20) // 4
    starts = [1 + i * (edge + 3) for i in range(3)]
    kinds = {
        "full": [Piece((0, rows), (0, keys), "full")],
        "causal": [Piece((0, keys), (0, keys), "causal")],
        "anticausal": [Piece((0, keys), (0, keys), "anticausal")],
        "gaps": [Piece((a, a + edge), (a + 2, a + 2 + edge), "causal") for a in starts],
        "window": whole(Mask(causal=True, window=unit + 6), keys, keys),
    }
    for groups in (8, 2):
        for dim in (128, 64):
            for kind, cut in kinds.items():
                more = SimpleNamespace(cut=cut, groups=groups, dim=dim, rows=rows, keys=keys)
                yield f"{kind}/8:{groups}/d{dim}", more
    for one, other in ((1, 1), (1, keys), (rows, 1)):
        cut = [Piece((0, one), (0, other), "full")]
        yield f"{one}x{other}", SimpleNamespace(cut=cut, groups=2, dim=64, rows=one, keys=other)
    odd = SimpleNamespace(cut=kinds["causal"], groups=2, dim=36, rows=rows, keys=keys)
    yield "causal/8:2/d36", odd


def check(bench: Bench, name: str, dtype: torch.dtype, case: SimpleNamespace) -> Row:
    """All outputs of the merged pieces; `ratio` 1 is what `testing.close` allows."""
    backend = backends.choose(bench.device, dtype, case.dim, name)
    more = {"heads": 8, "dim": case.dim, "dtype": dtype, "batch": 2}
    x = bench.tensors(case.rows, case.keys, case.groups, **more)
    found = merged(x, case.cut, backend)
    visible = shown(case.cut, case.rows, case.keys, bench.device)
    exact = reference(x, visible, torch.float64)
    plain = further_off(reference(x, visible, dtype), torch_reference(x, visible), exact)
    bounds = {label: bound(x, label, p, r) for label, p, r in zip(NAMES, plain, exact, strict=True)}
    pairs = zip(NAMES, found, exact, strict=True)
    ratios = {label: distance(a, r) / max(bounds[label], 1e-300) for label, a, r in pairs}
    return {
        "ms": [],
        "ratio": max(ratios.values()),
        "ratios": ratios,
        "rms": {n: rms(a, r) for n, a, r in zip(NAMES, found, exact, strict=True)},
        "rms_plain": {n: rms(a, r) for n, a, r in zip(NAMES, plain, exact, strict=True)},
        # Of few numbers the largest error scatters; a wrong result is off by far more.
        "ok": max(ratios.values()) <= 1.5,
    }


def bound(x: Tensors, label: str, plain: Tensor, exact: Tensor) -> float:
    """Twice what plain computations are off by; once more for the rounding of the surrogate."""
    dtype, keys = x.q.dtype, len(x.k)
    if label == "lse" and dtype in (torch.bfloat16, torch.float16):
        return torch.finfo(dtype).eps
    if label == "lse" and dtype == torch.float32:
        # Kernels keep it to base 2: a few roundings more than the plain logarithm.
        scale = max(1.0, exact[exact.isfinite()].abs().max().item())
        return max(allowance(dtype, plain, exact, 2.0), 8 * torch.finfo(dtype).eps * scale)
    if label in ("dq", "dk") and keys == 1:
        # Exactly 0 with one key: in units of the terms whose difference it is.
        terms = x.dout.double().norm(dim=-1).max() * x.v.double().norm(dim=-1).max()
        by = x.k.abs().max() if label == "dq" else 2 * x.q.double().norm(dim=0).max()
        return torch.finfo(dtype).eps * float(terms * by) * x.scale
    return allowance(dtype, plain, exact, 3.0 if label.startswith("d") else 2.0)


def further_off(some: list[Tensor], others: list[Tensor], exact: list[Tensor]) -> list[Tensor]:
    """Of each two results the worse: either may be nearly exact by chance."""
    triples = zip(some, others, exact, strict=True)
    return [max(a, b, key=lambda t, r=r: distance(t, r)) for a, b, r in triples]


def torch_reference(x: Tensors, visible: Tensor) -> list[Tensor]:
    """torch's attention with that mask, any back end; rows without keys keep the specification."""
    plain = reference(x, visible, x.q.dtype)
    if not visible.any(-1).all():
        return plain
    dout, *inputs = x.sdpa()
    inputs = [t.requires_grad_() for t in inputs]
    gqa = x.q.shape[2] != x.k.shape[2]
    out = functional.scaled_dot_product_attention(*inputs, attn_mask=visible, enable_gqa=gqa)
    gradients = torch.autograd.grad(out, inputs, dout)
    out, *rest = (t.detach().movedim(2, 0) for t in (out, *gradients))
    return [out, plain[1], *rest]


def merged(x: Tensors, cut: list[Piece], backend: Backend) -> list[Tensor]:
    """out, lse, dq, dk, dv of pieces, merged and summed as ranks do it."""
    acc, lse = accumulators(x.q)
    backends.attend_(acc, lse, x.q, x.k, x.v, cut, x.scale, backend)
    out = acc.to(x.q.dtype)
    stand_in = backends.surrogate(x.dout, backends.delta(x.dout, out), like=out)
    sums = tuple(torch.zeros_like(t, dtype=lse.dtype) for t in (x.q, x.k, x.v))
    given = (x.dout, x.q, x.k, x.v, stand_in, lse)
    backends.attend_backward_(sums, *given, cut, x.scale, backend)
    return [out, lse, *(total.to(x.q.dtype) for total in sums)]


def shown(cut: list[Piece], rows: int, keys: int, device: torch.device) -> Tensor:
    visible = torch.zeros(rows, keys, dtype=torch.bool, device=device)
    for (a, b), (c, d), kind in cut:
        square = torch.ones(b - a, d - c, dtype=torch.bool, device=device)
        visible[a:b, c:d] |= {"full": square, "causal": square.tril()}.get(kind, square.triu())
    return visible


def reference(x: Tensors, visible: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The specification on the same numbers in `dtype`, gradients from the stored lse and out."""
    dout, q, k, v = (t.to(dtype) for t in x.sdpa())
    out, lse = naive.attention(q, k, v, visible, x.scale)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    given = {"lse": lse, "delta": delta}
    gradients = naive.attention_backward(dout, q, k, v, visible, x.scale, **given)
    return [t.movedim(2, 0) for t in (out, lse, *gradients)]


def rms(x: Tensor, ref: Tensor) -> float:
    """|x - ref| / |ref| over the finite entries."""
    x, ref = x.double(), ref.double()
    finite = ref.isfinite()
    length = ref[finite].norm().item()
    return (x - ref)[finite].norm().item() / length if length else 0.0


def empty(bench: Bench, name: str, dtype: torch.dtype) -> Row:
    """No rows, no keys: nothing reaches the kernel, out 0, lse -inf."""
    backend = backends.choose(bench.device, dtype, 64, name)
    ok = True
    for rows, keys in ((0, 5), (5, 0)):
        x = bench.tensors(rows, keys, 2, heads=4, dim=64, dtype=dtype)
        out, lse = backends.forward(x.q, x.k, x.v, "full", 1.0, backend)
        given = (x.dout, x.q, x.k, x.v, out, lse, "full", 1.0, backend)
        zero = all(bool((g == 0).all()) for g in (out, *backends.backward(*given)))
        ok &= zero and bool(lse.isneginf().all())
    return {"ms": [], "ok": ok}


def other_strides(bench: Bench) -> Row:
    """Does cuDNN's backward still go wrong when `out` has other strides than its forward's?"""
    x = bench.tensors(512, 512, 8, heads=8, dim=64)
    q, k, v, dout = (t.permute(1, 2, 0, 3) for t in (x.q, x.k, x.v, x.dout))
    aten = torch.ops.aten
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=x.scale)
    exact = reference(x, torch.ones(512, 512, dtype=torch.bool, device=q.device), torch.float64)
    found = {}
    for label, given in (("as forward", out), ("other", out.contiguous())):
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, given, lse, seed, seed, None, None, None, 512, 512, 0.0, False),
            scale=x.scale,
        )
        pairs = zip(NAMES[2:], gradients, exact[2:], strict=True)
        found[label] = {n: rms(g.permute(2, 0, 1, 3), r) for n, g, r in pairs}
    return {
        "ms": [],
        "rms": found,
        "strides": [list(out.stride()), list(out.contiguous().stride())],
        "lse_shape": list(lse.shape),
        "ok": max(found["as forward"].values()) < 0.02,
    }


def triton_rows(bench: Bench) -> Row:
    """The compiled row kernels against torch in float64, absent and poisoned sides included."""
    worst = {}
    for dim in (128, 40):
        x = bench.tensors(1000, 1, 8, heads=8, dim=dim, batch=2)
        acc, lse = accumulators(x.q)
        acc.fill_(torch.nan)
        lse[::2] = torch.randn_like(lse[::2])
        acc[::2] = torch.randn_like(acc[::2])
        part_lse = torch.randn_like(lse)
        part_lse[::3] = float("-inf")
        wide, wide_lse = acc.double(), lse.double()
        merge_(acc, lse, x.q, part_lse)
        merge_(wide, wide_lse, x.q.double(), part_lse.double())
        worst[f"merge/d{dim}"] = max(distance(acc, wide), distance(lse, wide_lse))
        delta = backends.delta(x.dout, x.q)
        exact = backends.delta(x.dout.double(), x.q.double())
        worst[f"delta/d{dim}"] = distance(delta, exact) / dim
        stand_in = backends.surrogate(x.dout, delta)
        exact = backends.surrogate(x.dout.double(), exact).to(x.q.dtype)
        worst[f"surrogate/d{dim}"] = rms(stand_in, exact)
    return {"ms": [], "worst": worst, "ok": all(value < 1e-4 for value in worst.values())}


def merge_repeated(bench: Bench) -> Row:
    """Merges of one large input, all alike: a race between warps shows as rows that change."""
    x = bench.tensors(bench.step, 1, 8)
    start, start_lse = x.dout.float(), torch.randn(x.q.shape[:3], device=x.q.device)
    part_lse = torch.randn_like(start_lse)
    wanted, wanted_lse = start.clone(), start_lse.clone()
    merge._merge(wanted, wanted_lse, x.q, part_lse)
    wrong, worst = 0, 0.0
    for _ in range(100):
        acc, lse = start.clone(), start_lse.clone()
        merge_(acc, lse, x.q, part_lse)
        off = (acc - wanted).abs().amax(-1)
        wrong += int((off > 1e-5).sum())
        worst = max(worst, off.max().item(), (lse - wanted_lse).abs().max().item())
    rows = 100 * start_lse.numel()
    return {"ms": [], "rows": rows, "wrong_rows": wrong, "worst": worst, "ok": wrong == 0}


# path


def paths(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    for tokens in bench.tokens:
        for name in bench.names:
            for groups in (bench.heads, bench.heads // 4):
                for causal in (True, False):
                    who = f"path/{name}/{tokens}/{bench.heads}:{groups}/"
                    who += "causal" if causal else "full"
                    case = SimpleNamespace(name=name, tokens=tokens, groups=groups, causal=causal)
                    yield f"{who}/forward", lambda c=case: path_forward(bench, c)
                    yield f"{who}/backward", lambda c=case: path_backward(bench, c)


def torchs_own(bench: Bench, name: str) -> contextlib.AbstractContextManager:
    """torch's choice narrowed to the same kernels; on the CPU there is one."""
    if bench.device.type != "cuda":
        return contextlib.nullcontext()
    return torch_attention.sdpa_kernel(TORCH[name])


def path_forward(bench: Bench, case: SimpleNamespace) -> Row:
    """Our path in turns with scaled_dot_product_attention, on torch's layout and on storage."""
    backend = bench.backend(case.name)
    x = bench.tensors(case.tokens, case.tokens, case.groups)
    cut = whole(Mask(causal=case.causal), case.tokens, case.tokens)
    contiguous, views = x.sdpa()[1:], x.views()[1:]

    def theirs(tensors: tuple[Tensor, ...]) -> Tensor:
        return functional.scaled_dot_product_attention(
            *tensors, is_causal=case.causal, enable_gqa=case.groups != bench.heads
        )

    def ours() -> Tensor:
        return stretto.attention(*contiguous, causal=case.causal, backend=case.name)

    def ours_rows() -> Any:
        return backends.attend(x.q, x.k, x.v, cut, x.scale, backend)

    works = {
        "torch": lambda: theirs(contiguous),
        "ours": ours,
        "torch_rows": lambda: theirs(views),
        "ours_rows": ours_rows,
    }
    with torch.no_grad(), torchs_own(bench, case.name):
        reference = theirs(contiguous)
        same = {"bits_of_torch": torch.equal(ours(), reference)}
        same["rms_to_torch"] = rms(ours_rows()[0], reference.permute(2, 0, 1, 3))
        return compared(bench, case, works, backward=False) | same


def path_backward(bench: Bench, case: SimpleNamespace) -> Row:
    """The same of gradients, each of its own forward's."""
    backend = bench.backend(case.name)
    x = bench.tensors(case.tokens, case.tokens, case.groups)
    kind = "causal" if case.causal else "full"
    gqa = case.groups != bench.heads

    def backward_of(dout: Tensor, *tensors: Tensor, own: bool = False) -> Work:
        inputs = [t.detach().requires_grad_() for t in tensors]
        with torchs_own(bench, case.name):
            graph = (
                stretto.attention(*inputs, causal=case.causal, backend=case.name)
                if own
                else functional.scaled_dot_product_attention(
                    *inputs, is_causal=case.causal, enable_gqa=gqa
                )
            )
        return lambda: torch.autograd.grad(graph, inputs, dout, retain_graph=True)

    out, lse = backends.forward(x.q, x.k, x.v, kind, x.scale, backend)

    def through(given: Tensor) -> Any:
        return backends.backward(x.dout, x.q, x.k, x.v, given, lse, kind, x.scale, backend)

    def through_delta() -> Any:
        return through(backends.surrogate(x.dout, backends.delta(x.dout, out), like=out))

    works = {
        "torch": backward_of(*x.sdpa()),
        "ours": backward_of(*x.sdpa(), own=True),
        "torch_rows": backward_of(*x.views()),
        "ours_rows": lambda: through(out),
        "through_delta": through_delta,
    }
    theirs, ours = works["torch"](), works["ours"]()
    # cuDNN's dq differs from call to call in its last bits, and flash's does.
    same: Row = {"bits_of_torch": all(map(torch.equal, ours[1:], theirs[1:]))}
    pairs = [*zip(ours, theirs, strict=True)]
    pairs += [(a.permute(1, 2, 0, 3), b) for a, b in zip(works["ours_rows"](), theirs, strict=True)]
    same["rms_to_torch"] = max(rms(a, b) for a, b in pairs)
    return compared(bench, case, works, backward=True) | same


def compared(bench: Bench, case: SimpleNamespace, works: dict[str, Work], *, backward: bool) -> Row:
    """Times, rates, time of the host, and how much longer ours takes in percent of torch's."""
    times, host = bench.measured(works)
    shape = (case.tokens, case.tokens, bench.heads, bench.dim)
    work = flop(*shape, "causal" if case.causal else "full", backward)
    over = {
        key: over_percent(times[base], times[name])
        for key, (name, base) in OVER.items()
        if name in times
    }
    return {
        "ms": times["ours"],
        "times_ms": {name: result.spread(values) for name, values in times.items()},
        "host_us": {name: 1e3 * statistics.median(values) for name, values in host.items()},
        "tflops": {name: work / statistics.median(v) / 1e9 for name, v in times.items()},
        **over,
    }


def over_percent(base: list[float], values: list[float]) -> float:
    """Of medians; single ratios of interleaved runs scatter more."""
    return 100 * (statistics.median(values) / statistics.median(base) - 1)


# merge


def merges(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    for name in bench.names:
        for groups in (bench.heads, bench.heads // 4):
            for step in ("own", "earlier", "later"):
                who = f"merge/{name}/{bench.heads}:{groups}/{step}"
                yield who, lambda n=name, g=groups, s=step: merge_share(bench, n, g, s)
    yield "merge/rows", lambda: row_rates(bench)


def merge_share(bench: Bench, name: str, groups: int, step: str) -> Row:
    """One step of a zigzag causal ring: the kernel alone, and with its merge or its sums."""
    rows = bench.step
    cut = {
        "own": [Piece((0, rows), (0, rows), "causal")],
        "earlier": [Piece((0, rows), (0, rows // 2), "full")],
        "later": [Piece((rows // 2, rows), (0, rows), "full")],
    }[step]
    backend, x = bench.backend(name), bench.tensors(rows, rows, groups)
    acc, acc_lse = accumulators(x.q)
    backends.attend_(acc, acc_lse, x.q, x.k, x.v, cut, x.scale, backend)
    (a, b), (c, d), kind = cut[0]
    q, k, v, dout = x.q[a:b], x.k[c:d], x.v[c:d], x.dout[a:b]
    out, lse = backends.forward(q, k, v, kind, x.scale, backend)
    sums = tuple(torch.zeros_like(t, dtype=torch.float32) for t in (x.q, x.k, x.v))
    given = (x.dout, x.q, x.k, x.v, acc.to(x.q.dtype), acc_lse)
    works = {
        "kernel": lambda: backends.forward(q, k, v, kind, x.scale, backend),
        "step": lambda: backends.attend_(acc, acc_lse, x.q, x.k, x.v, cut, x.scale, backend),
        "merge": lambda: merge_(acc[a:b], acc_lse[a:b], out, lse),
        "backward_kernel": lambda: backends.backward(
            dout, q, k, v, given[4][a:b], given[5][a:b], kind, x.scale, backend
        ),
        "backward_step": lambda: backends.attend_backward_(sums, *given, cut, x.scale, backend),
    }
    times = bench.times(works)
    middle = {key: statistics.median(values) for key, values in times.items()}
    return {
        "ms": times["step"],
        "times_ms": {key: result.spread(values) for key, values in times.items()},
        "merge_percent": 100 * middle["merge"] / middle["step"],
        "over_kernel_percent": over_percent(times["kernel"], times["step"]),
        "sums_percent": over_percent(times["backward_kernel"], times["backward_step"]),
    }


def row_rates(bench: Bench) -> Row:
    """The row kernels alone at `--step` tokens, and the bytes per second that they move."""
    x = bench.tensors(bench.step, bench.step, bench.heads)
    acc, acc_lse = accumulators(x.q)
    lse = torch.zeros_like(acc_lse)
    merge_(acc, acc_lse, x.q, lse)
    delta, out = backends.delta(x.dout, x.q), torch.empty_like(x.q)
    works = {
        "merge": lambda: merge_(acc, acc_lse, x.q, lse),
        "delta": lambda: backends.delta(x.dout, x.q),
        "surrogate": lambda: backends.surrogate(x.dout, delta),
        "cast": lambda: acc.to(x.q.dtype),
        "copy": lambda: out.copy_(x.q),
    }
    times = bench.times(works)
    block = x.q.numel() * x.q.element_size()
    wide = acc.numel() * acc.element_size()
    moved = {"merge": 2 * wide + block, "delta": 2 * block, "surrogate": 2 * block}
    moved |= {"cast": wide + block, "copy": 2 * block}
    return {
        "ms": times["merge"],
        "times_ms": {key: result.spread(values) for key, values in times.items()},
        "bytes_per_s": {k: 1e3 * moved[k] / statistics.median(v) for k, v in times.items()},
    }


# blocks


def blocks(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    for name in bench.names:
        for kind in ("full", "causal"):
            for rows in bench.blocks:
                who = f"blocks/{name}/{kind}/{rows}"
                yield who, lambda n=name, k=kind, r=rows: block(bench, n, k, r)


def block(bench: Bench, name: str, kind: str, rows: int) -> Row:
    """Forward and backward of one square, replayed from a graph and called from the host."""
    backend, x = bench.backend(name), bench.tensors(rows, rows, bench.heads)
    out, lse = backends.forward(x.q, x.k, x.v, kind, x.scale, backend)
    given = (x.dout, x.q, x.k, x.v, out, lse, kind, x.scale, backend)
    calls = {
        "forward": lambda: backends.forward(x.q, x.k, x.v, kind, x.scale, backend),
        "backward": lambda: backends.backward(*given),
    }
    works = dict(calls)
    repeats = max(1, min(16, (4096 // rows) ** 2))
    if bench.device.type == "cuda":
        works |= {f"{key}_graph": graphed(work, repeats) for key, work in calls.items()}
    times = bench.times(works, waits=True)
    for key in times:
        if key.endswith("_graph"):
            times[key] = [value / repeats for value in times[key]]
    shape = (rows, rows, bench.heads, bench.dim, kind)
    work = {key: flop(*shape, key.startswith("backward")) for key in times}
    rates = {key: work[key] / statistics.median(v) / 1e9 for key, v in times.items()}
    return {
        "ms": times["forward"],
        "times_ms": {key: result.spread(values) for key, values in times.items()},
        "tflops": rates,
    }


def graphed(work: Work, repeats: int) -> Work:
    """`repeats` calls recorded once; replaying them costs the host one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    return graph.replay


# plans


def plans(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    options = bench.options
    ranks, tokens = (4, 96) if options.dry else (options.ranks, options.plan_tokens)
    for heads, groups in ((4, 4), (4, 2)) if options.dry else ((16, 16), (16, 4)):
        for causal in (True, False):
            one: dict[str, Any] = {}
            for name, context in named_points(ranks, heads, groups).items():
                kind = "causal" if causal else "full"
                who = f"plans/{name}/{ranks} ranks/{tokens}/{heads}:{groups}/{kind}"
                shape = SimpleNamespace(
                    tokens=tokens, heads=heads, groups=groups, mask=Mask(causal=causal)
                )
                yield who, lambda c=context, s=shape, o=one: plan_row(bench, c, s, o)


def plan_row(bench: Bench, context: Context, shape: SimpleNamespace, one: dict[str, Any]) -> Row:
    """Every rank's part of a plan against one device; `one` holds what all plans compare with."""
    x = bench.tensors(shape.tokens, shape.tokens, shape.groups, heads=shape.heads)
    if not one:
        one |= one_device(bench, x, shape.mask)
    case = AttentionCase.of(
        context,
        tokens=shape.tokens,
        heads=(shape.heads, shape.groups),
        head_dim=bench.dim,
        item_bytes=x.q.element_size(),
        mask=shape.mask,
    )
    parts, seconds = ranks_run(bench, context, case, x), []
    peak = 0
    for _ in range(bench.options.plan_repeats):
        before = memory(bench.device)
        seconds.append(result.timed(lambda: ranks_run(bench, context, case, x), bench.device))
        peak = memory(bench.device, peak=True) - before
    rows = (case.q_rows, case.q_rows, case.kv_rows, case.kv_rows)
    found = [together(p, r) for p, r in zip(zip(*parts, strict=True), rows, strict=True)]
    labels = ("out", "dq", "dk", "dv")
    errors = {n: rms(a, r) for n, a, r in zip(labels, found, one["exact"], strict=True)}
    ratios = {n: errors[n] / max(one["errors"][n], 1e-300) for n in labels}
    return {
        "ms": [1e3 * s for s in seconds],
        "plan": context.short(),
        "rms": errors,
        "rms_one_device": one["errors"],
        "ratio": max(ratios.values()),
        "one_device_ms": one["ms"],
        "peak_bytes_all_ranks": peak,
        "sent_bytes_per_rank": context.wire(case).total(),
        # Published rings let gradients ride in the inputs' dtype, which costs what it costs.
        **({} if riding(context) else {"ok": max(ratios.values()) <= 1.5}),
    }


def riding(context: Context) -> bool:
    """Whether a sum of gradients passes through many ranks in the inputs' dtype."""
    return (
        getattr(context.schedule, "gradients", "") == "ride" or context.schedule.kind == "startrail"
    )


def one_device(bench: Bench, x: Tensors, mask: Mask) -> dict[str, Any]:
    """The whole sequence at once: in this dtype, and in the next wider one as the truth."""
    wide, name = (torch.float64, "cpu") if bench.options.dry else (torch.float32, "efficient")
    cut = whole(mask, len(x.q), len(x.k))
    truth = backends.choose(bench.device, wide, bench.dim, name)
    backend = backends.choose(bench.device, bench.dtype, bench.dim, plan_backend(bench))
    exact = [t.permute(1, 2, 0, 3) for i, t in enumerate(merged(x.to(wide), cut, truth)) if i != 1]
    plain = [t.permute(1, 2, 0, 3) for i, t in enumerate(merged(x, cut, backend)) if i != 1]
    times = [result.timed(lambda: merged(x, cut, backend), bench.device) for _ in range(3)]
    labels = ("out", "dq", "dk", "dv")
    errors = {n: rms(a, r) for n, a, r in zip(labels, plain, exact, strict=True)}
    return {"exact": exact, "errors": errors, "ms": [1e3 * t for t in times]}


def plan_backend(bench: Bench) -> str:
    # cuDNN builds its graphs anew in every thread, and every virtual rank is one.
    return "cpu" if bench.options.dry else "flash"


def ranks_run(
    bench: Bench, context: Context, case: AttentionCase, x: Tensors
) -> list[tuple[Tensor, ...]]:
    """out, dq, dk, dv of every rank, forward and backward carried out by virtual ranks."""
    dout, q, k, v = (t.permute(1, 2, 0, 3) for t in (x.dout, x.q, x.k, x.v))
    world = LocalWorld(context.sizes, device=bench.device, timeout_s=120)

    def body(mesh: Mesh) -> tuple[Tensor, ...]:
        rank = mesh.rank("cp")
        here, keys = case.q_rows[rank], case.kv_rows[rank]
        out, _, saved = forward_rank(
            *(rows_of(q, here), rows_of(k, keys), rows_of(v, keys)),
            mesh=mesh,
            context=context,
            case=case.at(rank),
            backend=plan_backend(bench),
        )
        return (out, *backward_rank(rows_of(dout, here), saved))

    found = world.run(body)
    order = sorted(range(len(found)), key=lambda r: world.mesh(r).rank("cp"))
    return [found[rank] for rank in order]


def rows_of(x_BHLD: Tensor, rows: Spans) -> Tensor:
    return torch.cat([x_BHLD[:, :, a:b] for a, b in rows], dim=2)


def together(parts: tuple[Tensor, ...], rows: tuple[Spans, ...]) -> Tensor:
    """The whole (B, H, L, D) from every rank's rows of it."""
    total = sum(part.shape[2] for part in parts)
    whole = parts[0].new_empty(*parts[0].shape[:2], total, parts[0].shape[3])
    for part, spans in zip(parts, rows, strict=True):
        first = 0
        for a, b in spans:
            whole[:, :, a:b] = part[:, :, first : first + b - a]
            first += b - a
    return whole


def memory(device: torch.device, *, peak: bool = False) -> int:
    """Bytes allocated now, which also starts a new peak, or the peak since then. 0 on the CPU."""
    if device.type != "cuda":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


# run


def cases(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    makers = {"check": checks, "path": paths, "merge": merges, "blocks": blocks, "plans": plans}
    for section in bench.options.sections:
        yield from makers[section](bench)


def attempt(bench: Bench, who: str, case: Callable[[], Row]) -> Row:
    """The case's row; what went wrong is a row too, so that the others still run."""
    if time.monotonic() > bench.deadline:
        return {"who": who, "ms": [], "skipped": f"past {bench.options.seconds} s"}
    begin = time.monotonic()
    try:
        row = case()
    except Exception as error:  # noqa: BLE001  a failing kernel is a finding of this script
        where = traceback.format_exc().splitlines()[-4:]
        row = {"ms": [], "error": f"{type(error).__name__}: {error}"[:2000], "where": where}
    return {"who": who, **row, "seconds": round(time.monotonic() - begin, 2)}


def summary(rows: list[Row]) -> Row:
    """The numbers that are asked for."""
    found: Row = {"rows": len(rows), "errors": [r["who"] for r in rows if "error" in r]}
    found["skipped"] = sum("skipped" in row for row in rows)
    checked = [row for row in rows if "ok" in row]
    found["checks_ok"] = sum(row["ok"] for row in checked)
    found["checks_wrong"] = [row["who"] for row in checked if not row["ok"]]
    for key in OVER:
        over = {row["who"]: row[key] for row in rows if key in row}
        large = {who: value for who, value in over.items() if int(who.split("/")[2]) >= LARGE}
        for name, some in ((key, over), (f"{key}_from_{LARGE}_tokens", large)):
            if some:
                found[name] = spread_of(some)
    same = [row["bits_of_torch"] for row in rows if "bits_of_torch" in row]
    if same:
        found["bits_of_torch"] = f"{sum(same)} of {len(same)}"
    for name in ("torch", "ours", "torch_rows", "ours_rows"):
        calls = [row["host_us"][name] for row in rows if "host_us" in row]
        if calls:
            found[f"host_us_{name}"] = statistics.median(calls)
    for key in ("merge_percent", "over_kernel_percent", "sums_percent"):
        values = [row[key] for row in rows if key in row]
        if values:
            found[f"worst_{key}"] = max(values)
    return found


def spread_of(over: dict[str, float]) -> Row:
    worst = max(over, key=over.get)
    return {
        "median": statistics.median(over.values()),
        "worst": over[worst],
        "worst_at": worst,
        "within_5_percent": sum(value <= 5 for value in over.values()),
        "of": len(over),
    }


def shown_row(row: Row) -> str:
    for key in ("error", "skipped"):
        if key in row:
            return f"{key}: {row[key]}"
    parts = []
    if "ok" in row:
        parts.append("ok" if row["ok"] else "WRONG")
    parts += [f"{key} {row[key]:.3g}" for key in ("ratio",) if key in row]
    parts += [f"{key} {row[key]:+.2f}" for key in row if key.endswith("percent")]
    parts += [f"{k} {v:.0f}" for k, v in row.get("tflops", {}).items()]
    parts += [f"{k} {v['median']:.3f} ms" for k, v in row.get("times_ms", {}).items()]
    parts += [f"{k} {v:.0f} us of host" for k, v in row.get("host_us", {}).items()]
    return "  ".join(parts)


def main(options: argparse.Namespace) -> int:
    bench = Bench(options)
    name = result.device_name(bench.device)
    book = result.begin("attention/kernels", name, options.commit)
    book |= {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "heads": bench.heads,
        "head_dim": bench.dim,
        "step_tokens": bench.step,
        "notes": [line for line in __doc__.splitlines()[4:] if line],
    }
    print(f"{name}, torch {torch.__version__}", flush=True)
    for who, case in cases(bench):
        row = attempt(bench, who, case)
        book["rows"].append(row)
        book["summary"] = summary(book["rows"])
        result.write(options.out, book)
        print(f"{row['who']:44} {shown_row(row)}", flush=True)
    print(book["summary"], flush=True)
    return 1 if book["summary"]["errors"] or book["summary"]["checks_wrong"] else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sections", default="check,merge,path,blocks", help=", ".join(SECTIONS))
    parser.add_argument("--backends", default="cudnn,flash", help="of path, merge and blocks")
    parser.add_argument("--tokens", default="4096,8192,16384,32768", help="of path")
    parser.add_argument("--step", type=int, default=16384, help="tokens per step of merge")
    parser.add_argument("--ranks", type=int, default=8, help="virtual ranks of plans")
    parser.add_argument("--plan-tokens", type=int, default=32768, help="of plans, in all")
    parser.add_argument("--plan-repeats", type=int, default=1, help="timed runs of each plan")
    parser.add_argument("--repeats", type=int, default=9, help="of each comparison")
    parser.add_argument("--seconds", type=float, default=220, help="cases after that are skipped")
    parser.add_argument("--commit", default="unknown", help="recorded in the result")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    options.sections = [part for part in options.sections.split(",") if part]
    options.backends = [part for part in options.backends.split(",") if part]
    options.tokens = [int(part) for part in options.tokens.split(",")]
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(parse()))
