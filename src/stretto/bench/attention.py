"""`bench attention`: every plan exact, every byte as the formula says, on threads and over gloo.

In order of what matters: the byte table; every plan on up to 16 virtual ranks with every call, and
on up to 64 with the causal one; every plan over gloo up to 16 processes; numerical gradients; then
the other calls on 32 and 64. Whoever runs out of time says how much was left out.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from stretto.bench import result as document
from stretto.bench.attention_cases import Call, calls, plans
from stretto.bench.attention_exact import (
    Job,
    failed,
    gradcheck_rows,
    in_order,
    judged,
    local_rows,
    on_ranks,
    on_threads,
    same_bits,
)
from stretto.bench.attention_table import byte_rows
from stretto.bench.result import Keep, Say
from stretto.cluster.detect import usable_cores
from stretto.errors import StrettoError
from stretto.plan.context import legal_ulysses
from stretto.plan.ranges import Mask
from stretto.testing.ranks import PRELOAD, run_ranks

Row = dict[str, Any]

#: Seconds one start of gloo ranks may take, and between two writes of the file.
_RANKS_TIMEOUT_S = 240.0
_WRITE_EVERY_S = 5.0
_NOTES = (
    "max_err: largest difference from one device's naive attention in float64, of out, lse, dq, "
    "dk, dv, over the largest value where above 1; inputs are standard normal",
    "bytes: sent per rank; declared: equal to the plan's own on every rank, phase, verb and axis; "
    "closed: the rank that sends most equals the closed form per phase and axis (the axis says "
    "the link class), for causal and full calls of equal shards",
    "threads: virtual ranks of one process; gloo: processes, compared bit by bit with threads",
    "ring_over_best: over the plans whose Ulysses degree fits a node of 8",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run: rank counts on threads (all calls; causal only), over gloo, and minutes."""

    small: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 9, 12, 16)
    large: tuple[int, ...] = (32, 64)
    gloo: tuple[int, ...] = (4, 8, 16)
    gradients: int = 4
    minutes: float = 8.5


FULL = Size()
QUICK = Size(small=(2, 4), large=(), gloo=(2,), gradients=2, minutes=2)


def run(size: Size = FULL, *, say: Say | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """The document result/1. `keep` gets it every few seconds while it grows."""
    cores = usable_cores()
    device = f"virtual ranks and gloo ranks of 1 thread, {document.cpu_name()}"
    found = document.begin("attention", device, notes=list(_NOTES))
    found["left_out"] = 0
    bench = _Bench(found, size, cores, say or (lambda *_: None), keep or (lambda _: None))
    bench.add(byte_rows())
    bench.run()
    document.end(found)
    return found


@dataclass(slots=True)
class _Bench:
    """A run under way: a row per run so far, and the time that is left."""

    found: dict[str, Any]
    size: Size
    cores: int
    say: Say
    keep: Keep
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    written: float = 0.0

    def run(self) -> None:
        first = [*jobs(self.size.small, every=True), *jobs(self.size.large, every=False)]
        self.on_threads("virtual ranks", first)
        for ranks in self.size.gloo:
            self.on_gloo(ranks)
        self.gradients()
        self.on_threads("virtual ranks, other calls", others(self.size.large))

    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.began + 60 * self.size.minutes - time.monotonic()

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.found["rows"] = merged(self.rows)
        self.found["summary"] = summary(self.rows)
        self.found["seconds"] = time.monotonic() - self.began
        if time.monotonic() - self.written > _WRITE_EVERY_S:
            self.keep(self.found)
            self.written = time.monotonic()

    def on_threads(self, what: str, wanted: list[Job]) -> None:
        self._spread(what, local_rows, _batches(wanted), len)

    def gradients(self) -> None:
        ranks = self.size.gradients
        checked = [[(name, context, tiny(ranks))] for name, context in plans(ranks).items()]
        self._spread("numerical gradients", gradcheck_rows, checked, len)

    def _spread(self, what: str, work: Callable, batches: list, count: Callable) -> None:
        """Batches over the cores; each result is added as it comes."""
        total, done = sum(map(count, batches)), 0
        waiting, running = iter(batches), set[Future]()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "stretto.testing.ranks"])
        with ProcessPoolExecutor(self.cores, mp_context=context) as pool:
            while True:
                while len(running) < self.cores and self.left() > 0:
                    batch = next(waiting, None)
                    if batch is None:
                        break
                    running.add(pool.submit(work, batch))
                if not running:
                    break
                ready, running = wait(running, return_when="FIRST_COMPLETED")
                for future in ready:
                    done += len(future.result())
                    self.add(future.result())
                self.say(what, done, total)
        self.found["left_out"] += sum(map(count, waiting))

    def on_gloo(self, ranks: int) -> None:
        wanted = over_gloo(ranks)
        for at in range(0, len(wanted), 16):
            batch = wanted[at : at + 16]
            if self.left() <= 0:
                self.found["left_out"] += len(batch)
                continue
            self.say(f"{ranks} gloo ranks", at, len(wanted))
            self.add(gloo_rows(ranks, batch))


# ---- what is run -------------------------------------------------------------------------------


def legal(ranks: int) -> Iterator[tuple[int, str, Any, list[Call]]]:
    """(number, name, plan, calls whose heads it splits) of all plans for `ranks` ranks."""
    for number, (name, context) in enumerate(plans(ranks).items()):
        fits = [c for c in calls(ranks) if context.ulysses in legal_ulysses(*c.heads, ranks)]
        yield number, name, context, fits


def jobs(counts: Sequence[int], *, every: bool) -> list[Job]:
    """Every plan with every call, or with the causal one alone; the slow ones first."""
    found = [
        (name, context, call)
        for ranks in counts
        for _, name, context, fits in legal(ranks)
        for call in (fits if every else fits[:1])
    ]
    return sorted(found, key=lambda job: -job[1].degree)


def others(counts: Sequence[int]) -> list[Job]:
    """Every plan with one more call, another one from plan to plan."""
    return [
        (name, context, fits[1 + number % (len(fits) - 1)])
        for ranks in counts
        for number, name, context, fits in legal(ranks)
    ]


def over_gloo(ranks: int) -> list[Job]:
    """Every plan with the causal call and another; on few ranks with three others."""
    found = []
    for number, name, context, fits in legal(ranks):
        found.append((name, context, fits[0]))
        for more in range(3 if ranks <= 4 else 1):
            found.append((name, context, fits[1 + (number + 3 * more) % (len(fits) - 1)]))
    return found


def tiny(ranks: int) -> Call:
    """Few numbers, because every one is moved: two rows per rank, one of two key heads for two."""
    heads = (ranks, max(1, ranks // 2))
    return Call("gradcheck", ranks, 2 * ranks, 2 * ranks, heads, Mask(causal=True), head_dim=2)


def _batches(wanted: list[Job]) -> list[list[Job]]:
    """Jobs in groups of about equal time: work grows with the square of the ranks."""
    batches: list[list[Job]] = []
    weight = 0.0
    for job in wanted:
        if not batches or weight > 2000:
            batches.append([])
            weight = 0.0
        batches[-1].append(job)
        weight += job[1].degree ** 2
    return batches


def gloo_rows(ranks: int, batch: list[Job]) -> list[Row]:
    """Rows of some jobs on gloo processes, from one start of them."""
    try:
        found = run_ranks(on_ranks, {"ring_out": ranks}, batch, timeout_s=_RANKS_TIMEOUT_S)
    except StrettoError as error:
        return [failed(name, context, call, "gloo", error) for name, context, call in batch]
    rows = []
    for number, (name, context, call) in enumerate(batch):
        pieces = in_order([own[number] for own in found])
        row = judged(name, context, call, pieces, "gloo")
        row["same_bits"] = same_bits(pieces, on_threads(context, call))
        row["right"] = row["right"] and row["same_bits"]
        rows.append(row)
    return rows


# ---- what is said ------------------------------------------------------------------------------


def merged(rows: Sequence[Row]) -> list[Row]:
    """One row per plan, ranks and carrier, of all its runs; other rows as they are.

    `declared`, `closed`, `same_bits`: of how many runs it holds; closed forms are for `closed_of`
    of them. Bytes are those of the causal call.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["part"] == "exact":
            key = ("exact", row["carrier"], row["ranks"], row["plan"])
        else:
            key = (len(groups),)
        groups.setdefault(key, []).append(row)
    return [_merged(own) if own[0]["part"] == "exact" else own[0] for own in groups.values()]


def _merged(own: list[Row]) -> Row:
    first = {name: own[0][name] for name in ("part", "carrier", "ranks", "plan", "ulysses")}
    causal = next((row for row in own if row["case"] == "causal"), {})
    errors = [row["max_err"] for row in own]
    wrong = [f"{row['case']}: {row['wrong']}" for row in own if "wrong" in row]
    found = first | {
        "runs": len(own),
        "cases": sorted({row["case"] for row in own}),
        "max_err": None if None in errors else max(errors),
        "forward_bytes": causal.get("forward_bytes"),
        "backward_bytes": causal.get("backward_bytes"),
        "declared": sum(bool(row.get("bytes_declared")) for row in own),
        "closed": sum(bool(row.get("bytes_closed")) for row in own),
        "closed_of": sum(row.get("bytes_closed") is not None for row in own),
        "right": all(row["right"] for row in own),
    }
    if first["carrier"] == "gloo":
        found["same_bits"] = sum(bool(row.get("same_bits")) for row in own)
    return found | ({"wrong": "; ".join(wrong)} if wrong else {})


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that are quoted; None where nothing was run for them."""
    exact = [row for row in rows if row["part"] == "exact"]
    checked = [row for row in rows if row["part"] == "gradcheck"]
    gloo = [row for row in exact if row["carrier"] == "gloo"]
    errors = [float("inf") if row["max_err"] is None else row["max_err"] for row in exact]
    matched = [row.get("bytes_declared") and row["bytes_closed"] is not False for row in exact]
    return {
        "max_err_fp64": max(errors, default=None),
        "gradcheck_ok": all(row["right"] for row in checked) if checked else None,
        "bytes_match": all(matched) if matched else None,
        "ring_over_startrail_bytes_p64": _over_ring(
            exact, lambda row: row["plan"] == "startrail(4)"
        ),
        "ring_over_best_bytes_p64": _over_ring(exact, _in_a_node),
        "gloo_equals_threads": all(row.get("same_bits") for row in gloo) if gloo else None,
        "plans": len({row["plan"] for row in exact}),
        "runs": len(exact) + len(checked),
        "wrong": sum(not row["right"] for row in [*exact, *checked]),
        "gloo_ranks": max((row["ranks"] for row in gloo), default=0),
        "virtual_ranks": max((row["ranks"] for row in exact), default=0),
    }


def _in_a_node(row: Row) -> bool:
    return row["ulysses"] <= 8


def _over_ring(exact: Sequence[Row], of: Callable[[Row], bool]) -> float | None:
    """Counted forward bytes of the ring over those of the best plan chosen, at 64 ranks, MHA."""
    large = {
        row["plan"]: row
        for row in exact
        if row["ranks"] == 64 and row["case"] == "causal" and row["max_err"] is not None
    }
    others = [row["forward_bytes"] for name, row in large.items() if name != "ring" and of(row)]
    if "ring" not in large or not others:
        return None
    return large["ring"]["forward_bytes"] / min(others)
