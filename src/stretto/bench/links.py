"""`bench links`: attention plans on emulated nodes, against what their links allow at best.

Real ranks over gloo in network namespaces, one per node, whose interfaces are held to one rate.
The code that moves the bytes is the product's; only kernels are stand-ins, which either take no
time (communication) or sleep as long as a device of a stated rate would compute (timed compute).
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stretto.bench import result as document
from stretto.bench.links_cases import (
    FAST,
    FREE,
    NO_TIME,
    TIMED,
    Call,
    Layout,
    Rates,
    Wanted,
    interface_bytes,
    kernel_of,
    kernel_seconds,
    wanted,
)
from stretto.bench.links_nodes import HERE, Nodes, check_able, made
from stretto.bench.links_ranks import Fleet, Timing
from stretto.bench.links_summary import summary
from stretto.errors import ConfigError
from stretto.plan.moves import PASSES

Say = Callable[..., None]
Keep = Callable[[dict[str, Any]], None]

#: Rounds that are made also when time is up.
_LEAST_REPEATS = 3
#: A repeat is discarded when other work kept more cores busy than this, while enough remain.
MOST_OTHERS = 0.25
_NOTES = (
    "network namespaces on one machine, gloo over TCP, token buckets on both ends of every node's "
    "interface: rates are emulated, latencies are the machine's; TCP's timeouts are off, as "
    "nothing is lost there",
    "communication: kernels take no time and compute nothing; timed compute: they sleep as long "
    "as the modelled device would compute (emulation); everything around kernels is real",
    "fast links: the same at a rate at which the machine's cores are part of the time, for the "
    "plans of the headline",
    "seconds: from an agreed start until the last rank has ended; forward and backward start "
    "apart, total is their sum",
    "ideal: bytes through the busiest way of the busiest node's interface / rate; floor: the same "
    "plan with the links as fast as the machine, median",
    "predicted: the cost model on the emulated cluster: the limited rate, and what was measured "
    "with all ranks at it before any plan ran: a rank's rate inside its node, latencies, a step "
    "without rows, rates of merging and adding, how much of the cores' work passes beside the wire",
    "cores, others: kept busy by the ranks, by other work during a repeat; repeats above "
    f"{MOST_OTHERS} of the latter are discarded where 3 quieter ones remain",
    "after the first round only those are repeated that took at most `near` times the fastest's "
    "time, and those quoted; every case has its share of the minutes, and fewer repeats, three at "
    "least, where they do not suffice",
    "with timed compute a plan is left out whose links alone need more than the fastest took",
    "auto and a named plan that are one plan are measured once",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run. `rate`: bytes/s of a node's interface, each way; `flop_rate`: of the
    modelled device. The plans of the headline also run at `fast_rate`. `emulated` False keeps
    ranks in the machine's own namespace, unlimited.
    """

    layouts: tuple[Layout, ...] = (Layout(2, 8), Layout(4, 4), Layout(2, 4), Layout(8, 2))
    calls: tuple[Call, ...] = (Call(8), Call(2))
    headline: tuple[Layout, Call] | None = (Layout(2, 8), Call(8))
    rate: float = 20e6 / 8
    fast_rate: float = 80e6 / 8
    flop_rate: float = 3e7
    repeats: int = 5
    floor_repeats: int = 1
    near: float = 1.15
    minutes: float = 11.0
    emulated: bool = True

    def only(self, names: Sequence[str]) -> Size:
        """Some of the layouts, in the same minutes each. Raises ConfigError for unknown ones."""
        kept = tuple(layout for layout in self.layouts if str(layout) in names)
        if unknown := set(names) - {str(layout) for layout in self.layouts}:
            raise ConfigError(
                f"no layout {', '.join(sorted(unknown))}\n"
                f"  to fix: any of {', '.join(map(str, self.layouts))}"
            )
        shares = self.shares()
        minutes = sum(shares[layout, call] for layout in kept for call in self.calls) / 60
        return replace(self, layouts=kept, minutes=minutes)

    def modes(self, layout: Layout, call: Call) -> tuple[str, ...]:
        """What is run of a case, in order."""
        return (FREE, TIMED, FAST) if (layout, call) == self.headline else (FREE, TIMED)

    def rate_of(self, mode: str) -> float:
        """Bytes/s of a node's interface."""
        return self.fast_rate if mode == FAST else self.rate

    def shares(self) -> dict[tuple[Layout, Call], float]:
        """Seconds for every case: by its bytes, and by what each of its ranks does in any case.

        The headline has half as much again for its fast links.
        """
        weights = {
            (layout, call): layout.ranks * (call.kv_heads + call.heads / 2)
            for layout in self.layouts
            for call in self.calls
        }
        if self.headline in weights:
            weights[self.headline] *= 1.5
        return {case: 60 * self.minutes * w / sum(weights.values()) for case, w in weights.items()}


FULL = Size()
QUICK = Size(layouts=(Layout(2, 2),), calls=(Call(8),), repeats=2, minutes=1.0)


def run(size: Size = FULL, *, say: Say | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """The document result/1. `keep` gets it after every case.

    Raises ConfigError without root, MissingDependency without iproute2, RunError.
    """
    if size.emulated:
        check_able()
    device = f"emulated nodes: gloo ranks in network namespaces, {document.cpu_name()}"
    found = document.begin(
        "links",
        device,
        notes=list(_NOTES),
        rate_bytes_per_s=size.rate,
        fast_rate_bytes_per_s=size.fast_rate,
        flop_rate=size.flop_rate,
        block_bytes=size.calls[0].block_bytes,
        repeats=size.repeats,
        near=size.near,
        emulated=size.emulated,
        rates={},
    )
    began = end = time.monotonic()
    for layout in size.layouts:
        with _started(size, layout) as (nodes, fleet):
            bench = _Bench(found, size, layout, nodes, fleet, say or (lambda *_: None))
            for call in size.calls:
                # What one case leaves of its time, the next may use.
                end += size.shares()[layout, call]
                found["rows"] += bench.case(call, end)
                found["summary"] = summary(found["rows"])
                found["seconds"] = time.monotonic() - began
                if keep:
                    keep(found)
    document.end(found)
    # The ranks are most of the load; what else ran is in every row.
    found["busy"] = found["summary"]["others"] > MOST_OTHERS
    return found


@contextlib.contextmanager
def _started(size: Size, layout: Layout) -> Iterator[tuple[Nodes | None, Fleet]]:
    """Nodes and the ranks on them, or ranks without nodes of their own."""
    if not size.emulated:
        with Fleet([HERE] * layout.ranks) as fleet:
            yield None, fleet
        return
    with (
        made(layout.nodes) as nodes,
        Fleet([nodes.places[node] for node in layout.node_of]) as fleet,
    ):
        yield nodes, fleet


@dataclass(slots=True)
class _Task:
    """A plan of one mode, its number at the ranks, and its times so far."""

    number: int
    mode: str
    plan: Wanted
    ideal: dict[str, float]
    kernels: dict[str, float]
    crossing: dict[str, int]
    floor: list[tuple[Timing, Timing]] = field(default_factory=list)
    times: list[tuple[Timing, Timing]] = field(default_factory=list)

    @property
    def least(self) -> float:
        """Seconds that links or kernels need, whichever need more."""
        return sum(max(self.ideal[name], self.kernels[name]) for name in PASSES)

    @property
    def best(self) -> float:
        """Seconds of the fastest repeat; without any, infinite."""
        return min(map(_total, self.times), default=math.inf)


@dataclass(slots=True)
class _Bench:
    """One layout under way."""

    found: dict[str, Any]
    size: Size
    layout: Layout
    nodes: Nodes | None
    fleet: Fleet
    say: Say
    numbers: int = 0

    def case(self, call: Call, end: float) -> list[dict[str, Any]]:
        """Rows of every plan and mode of a call, after interleaved rounds; few after `end`."""
        rates = self._rates(call)
        self.found["rates"].setdefault(str(self.layout), {})[call.name] = asdict(rates)
        modes = self.size.modes(self.layout, call)
        tasks = [task for mode in modes for task in self._tasks(call, mode, rates)]
        self._limit(None)
        once = list({task.plan.plan: task for task in reversed(tasks)}.values())[::-1]
        # The first round opens connections and is thrown away.
        for number in range(1 + self.size.floor_repeats):
            for task in self._each(once, f"{call.name} floor {number}"):
                pair = self._pair(task)
                if number:
                    task.floor.append(pair)
        for number in range(self.size.repeats):
            if number >= _LEAST_REPEATS and time.monotonic() > end:
                break
            for mode in modes:
                self._limit(self.size.rate_of(mode))
                same = [task for task in tasks if task.mode == mode]
                for task in self._each(same, f"{call.name} {mode} {number}"):
                    if self._due(task, same):
                        task.times.append(self._pair(task))
        floors = {task.plan.plan: task.floor for task in once}
        return [
            _row(self.layout, call, task, name, floors[task.plan.plan])
            for task in tasks
            for name in task.plan.names
            if task.times
        ]

    def _due(self, task: _Task, same: Sequence[_Task]) -> bool:
        """Whether to run a plan again, or at all; `same`: those of its mode.

        Once measured only those that may be the best, and those quoted. With timed compute not at
        all what cannot be, by what its links need.
        """
        best = min(other.best for other in same)
        if not task.times:
            return task.mode != TIMED or task.least <= best
        return task.best <= self.size.near * best or self._quoted(task, same)

    def _quoted(self, task: _Task, same: Sequence[_Task]) -> bool:
        """Whether the summary speaks of it: on the headline's layout, the faster StarTrail."""
        if self.size.headline is None or self.layout != self.size.headline[0]:
            return False
        if task.mode == TIMED or not task.plan.quoted:
            return False
        alike = [other.best for other in same if other.plan.is_startrail]
        return not task.plan.is_startrail or task.best == min(alike)

    def _tasks(self, call: Call, mode: str, rates: Rates) -> list[_Task]:
        """The plans of a mode, ready at the ranks; those first that are predicted to be fast."""
        flop_rate = self.size.flop_rate if mode == TIMED else NO_TIME
        rate, tasks = self.size.rate_of(mode), []
        cluster = replace(rates, network=rate).cluster(self.layout, flop_rate)
        for plan in wanted(self.layout, call, cluster):
            if mode == FAST and not plan.quoted:
                continue
            self.numbers += 1
            context, kernel = plan.plan.cp, kernel_of(flop_rate)
            task = (plan.plan.sizes, context, call.of(context), (kernel.forward, kernel.backward))
            self.fleet.ask("prepare", self.numbers, *task)
            crossing = interface_bytes(plan.plan, call, self.layout)
            ideal = {name: count / rate for name, count in crossing.items()}
            kernels = kernel_seconds(context, call, flop_rate)
            tasks.append(_Task(self.numbers, mode, plan, ideal, kernels, crossing))
        return sorted(tasks, key=lambda task: sum(task.plan.predicted.values()))

    def _each(self, tasks: Sequence[_Task], what: str) -> Iterator[_Task]:
        """Tasks in order, each said."""
        for done, task in enumerate(tasks):
            self.say(f"{self.layout} {what}: {task.plan.names[0]}", done, len(tasks))
            yield task

    def _pair(self, task: _Task) -> tuple[Timing, Timing]:
        forward, backward = (self.fleet.timed(name, task.number) for name in PASSES)
        return forward, backward

    def _limit(self, rate: float | None) -> None:
        if self.nodes:
            self.nodes.limit(rate)

    def _rates(self, call: Call) -> Rates:
        """What the cost model needs to know of this machine."""
        self._limit(None)
        layout, inside, latency_inside = self.layout, 0.0, 0.0
        if layout.per_node > 1:
            block = 2 * call.block_bytes
            latency_inside = self._hop({"ring_in": 64})
            seconds = self._hop({"ring_in": block})
            # Beside other work the small message may take as long as the large one.
            inside = block / max(seconds - latency_inside, seconds / 2)
        self._limit(self.size.rate)
        latency_across = self._hop({"ring_out": 64}) if layout.nodes > 1 else 0.0
        overlap = self._overlap(inside, latency_inside, latency_across)
        step, merge_rate, add_rate = self._steps(call)
        work = (inside, latency_inside, latency_across, step, merge_rate, add_rate)
        return Rates(self.size.rate, *work, overlap)

    def _hop(self, counts: dict[str, int]) -> float:
        """Seconds of a hop that all ranks make at once: the best of three runs of many."""
        sizes = {"ring_out": self.layout.nodes, "ring_in": self.layout.per_node}
        hops = 20
        self.fleet.timed("shift", sizes, counts, 2)
        runs = [self.fleet.timed("shift", sizes, counts, hops) for _ in range(3)]
        return min(timing.seconds for timing in runs) / hops

    def _overlap(self, inside: float, latency_inside: float, latency_across: float) -> float:
        """How much of the cores' work passes beside the wire, by hops that need as much of both.

        A hop inside and one across at once: the work of the first and both latencies, and the
        second's bytes at the limited rate.
        """
        if 1 in (self.layout.nodes, self.layout.per_node):
            return 1.0
        work = 2 * (latency_inside + latency_across)
        count = round(inside * (work - latency_inside - latency_across))
        across = round(work * self.size.rate / self.layout.per_node)
        both = self._hop({"ring_in": count, "ring_out": across})
        return min(1.0, max(0.0, (2 * work - both) / work))

    def _steps(self, call: Call) -> tuple[float, float, float]:
        """Seconds of a step without rows; bytes/s of merging forward, of adding backward."""
        shape = (call.rows, call.heads, call.kv_heads, call.head_dim)
        least = [self._step((1, 1, 1, 1), back=back) for back in (False, True)]
        whole = [self._step(shape, back=back) for back in (False, True)]
        keys = 2 * call.block_bytes * call.kv_heads // call.heads
        counts = call.block_bytes, call.block_bytes + keys
        rates = [
            count / max(seconds - start, seconds / 10)
            for count, seconds, start in zip(counts, whole, least, strict=True)
        ]
        return sum(least) / 2, rates[0], rates[1]

    def _step(self, shape: tuple[int, int, int, int], *, back: bool) -> float:
        """Seconds of a step that all ranks make at once."""
        count = 20
        runs = [self.fleet.timed("steps", count, shape, back) for _ in range(3)]
        return min(timing.seconds for timing in runs) / count


def _row(layout: Layout, call: Call, task: _Task, name: str, floor: list) -> dict[str, Any]:
    """What was found of a plan, under one of its names."""
    plan, quiet = task.plan.plan, quiet_of(task.times)
    return {
        "layout": str(layout),
        "heads": call.name,
        "mode": task.mode,
        "who": name,
        "plan": str(plan),
        "keep": plan.cp.schedule.keep,
        "named": not name.startswith("auto"),
        "ms": [1e3 * _total(pair) for pair in quiet],
        "repeats": len(task.times),
        "discarded": len(task.times) - len(quiet),
        "measured_ms": _by_pass(quiet),
        "floor_ms": _by_pass(floor) if floor else None,
        "ideal_ms": _with_total(task.ideal),
        "kernel_ms": _with_total(task.kernels),
        "predicted_ms": _with_total(task.plan.predicted),
        "interface_blocks": {k: n / call.block_bytes for k, n in task.crossing.items()},
        "cores": statistics.median(t.own for pair in quiet for t in pair),
        "others": statistics.median(t.others for pair in quiet for t in pair),
        "late_ms": 1e3 * max(t.late for pair in quiet for t in pair),
    }


def quiet_of(times: Sequence[tuple[Timing, Timing]]) -> list[tuple[Timing, Timing]]:
    """Repeats during which little else ran; all, where fewer than three are so."""
    quiet = [pair for pair in times if max(t.others for t in pair) <= MOST_OTHERS]
    return quiet if len(quiet) >= 3 else list(times)


def _total(pair: Sequence[Timing]) -> float:
    return sum(timing.seconds for timing in pair)


def _by_pass(times: Sequence[tuple[Timing, Timing]]) -> dict[str, dict[str, float]]:
    """Milliseconds by pass and in total, least and median."""
    by_pass = {name: [pair[at].seconds for pair in times] for at, name in enumerate(PASSES)}
    by_pass["total"] = [_total(pair) for pair in times]
    return {
        name: {"min": 1e3 * min(values), "median": 1e3 * statistics.median(values)}
        for name, values in by_pass.items()
    }


def _with_total(seconds: dict[str, float]) -> dict[str, float]:
    found = {name: 1e3 * value for name, value in seconds.items()}
    return found | {"total": sum(found.values())}
