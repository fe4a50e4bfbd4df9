"""Time and bytes of each window of a step-parallel generation.

Projected time is the sum over windows of the slowest evaluation, the exchange and the replayed
scheduler steps, plus encoding and decoding. Bytes come from the options' own `wire`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stretto import axes
from stretto.cluster.model import Cluster
from stretto.cost.comm import Path, paths, slowest
from stretto.errors import PlanMismatch
from stretto.plan.model import Plan
from stretto.plan.options import GuidanceCase, StepsCase
from stretto.plan.traffic import Traffic
from stretto.workload import denoise
from stretto.workload.model import Workload


@dataclass(frozen=True)
class Cut:
    """How one step's evaluation is cut: the guidance split and the ranks of an exact step.

    `fraction`: this cfg rank's part of the batch (of the calls, when whole calls are split).
    """

    split: str
    fraction: float
    chunks: int
    raw_bytes: int


def cut_of(workload: Workload, plan: Plan) -> Cut:
    """The cut that a plan asks for. Raises PlanMismatch where shapes do not allow it."""
    degree, rows = plan.cfg.degree, denoise.rows_of(workload)
    calls, raw = denoise.calls_per_step(workload), denoise.raw_bytes_of(workload)
    batched = plan.cfg.split != "calls" and rows % degree == 0
    if not batched and (plan.cfg.split == "batch" or calls < degree):
        raise PlanMismatch(
            f"cfg={degree} does not divide the denoiser's batch of {rows} nor its {calls} call(s) "
            f"per step\n  why: guidance is {workload.guidance!r}\n"
            f"  to fix: cfg={denoise.branches(workload)}, and the other ranks to step"
        )
    if not batched:
        return Cut("calls", -(-calls // degree) / calls, 1, raw)
    # The published schedule computes its exact steps on every rank.
    shares = plan.step.exact_split and plan.step.degree > 1 and plan.step.guesses != "own"
    chunks = denoise.chunks_of(rows // degree, plan.step.degree) if shares else 1
    return Cut("batch", 1 / degree, chunks, raw // degree)


def evaluation_seconds(workload: Workload, cluster: Cluster, rank: int) -> float:
    """One evaluation with all branches on a rank's device alone. Raises ConfigError (dtype)."""
    model, device = workload.evaluation, cluster.device(rank)
    if model.seconds is None:
        assert model.flops is not None, "Evaluation holds seconds or flops"
        return model.flops / (device.flop_rate(model.dtype) * model.efficiency)
    if model.device is None or model.device not in cluster.devices:
        return model.seconds
    measured_on = cluster.devices[model.device]
    return model.seconds * measured_on.flop_rate(model.dtype) / device.flop_rate(model.dtype)


@dataclass(frozen=True)
class WindowTimes:
    """Seconds of one window, and the part of one sequential evaluation that it takes."""

    evaluate: float
    exchange: float
    replay: float


class Windows:
    """Times of windows by their size, for one workload, cluster and plan."""

    def __init__(self, workload: Workload, cluster: Cluster, plan: Plan):
        self._workload, self._plan = workload, plan
        self.cut = cut_of(workload, plan)
        self._over = {axis: paths(cluster, plan, axis) for axis in plan.sizes}
        self._places = [axes.coordinates(r, plan.sizes) for r in range(plan.world_size)]
        self._full = [evaluation_seconds(workload, cluster, r) for r in range(plan.world_size)]

    def over(self, axis: str) -> list[Path]:
        return self._over[axis]

    def times(self, size: int) -> WindowTimes:
        """Seconds of a window of `size` steps."""
        replayed = 1 if size == 1 else 2 * size - 1  # the guesses' walk, then the true one
        exchange = self._guidance() + self._steps(size)
        return WindowTimes(self._evaluate(size), exchange, replayed * self._workload.step_seconds)

    def report_seconds(self, num_steps: int) -> float:
        """The closing exchange of guess errors."""
        sent = self._sent((num_steps,), {"report"})
        return sum(slowest(self.over("step"), verb, n, self._plan.step.degree) for verb, n in sent)

    def _evaluate(self, size: int) -> float:
        cost = self._workload.evaluation.half_batch_cost
        part = self.cut.fraction / (self.cut.chunks if size == 1 else 1)
        # Whole calls cost their number: cutting calls leaves each batch as it is.
        relative = part if self.cut.split == "calls" else denoise.share(cost, part)
        working = self.cut.chunks if size == 1 and self.cut.chunks > 1 else size
        if size == 1 and self.cut.chunks == 1:
            working = self._plan.step.degree
        pairs = zip(self._places, self._full, strict=True)
        return max(full for place, full in pairs if place["step"] < working) * relative

    def _steps(self, size: int) -> float:
        """The exchange over the step axis: one gather, or a broadcast from each owner in turn."""
        owners = size if size > 1 else self.cut.chunks
        sent = self._sent((size,), {"window", "exact"})
        return sum(
            slowest(self.over("step"), verb, n, self._plan.step.degree)
            * (owners if verb == "broadcast" else 1)
            for verb, n in sent
        )

    def _sent(self, sizes: tuple[int, ...], phases: set[str]) -> list[tuple[str, int]]:
        """(verb, bytes) of position 0, which owns a message in every window."""
        case = self._steps_case(sizes, 0)
        lanes = self._plan.step.wire(case)
        return [(lane.verb, num) for lane, num in lanes if lane.phase in phases]

    def _guidance(self) -> float:
        """The exchange over the cfg axis in one step: what each rank sends, one after another."""
        degree, over = self._plan.cfg.degree, self.over("cfg")
        ranks = [0] if self.cut.split == "batch" else range(degree)
        lanes = [lane for c in ranks for lane in self._plan.cfg.wire(self._cfg_case(1, c))]
        return sum(slowest(over, lane.verb, sent, degree) for lane, sent in lanes)

    def _steps_case(self, sizes: tuple[int, ...], rank: int) -> StepsCase:
        cut = self.cut
        return StepsCase(sizes, rank, self._workload.guided_bytes, cut.raw_bytes, cut.chunks)

    def _cfg_case(self, evaluations: int, rank: int) -> GuidanceCase:
        raw = denoise.raw_bytes_of(self._workload)
        calls = denoise.calls_per_step(self._workload)
        guided = self._workload.guided_bytes
        return GuidanceCase(evaluations, calls, rank, raw, guided, self.cut.split)

    def traffic(self, sizes: Sequence[int]) -> tuple[Traffic, ...]:
        """Bytes that each rank sends in the whole generation, as the plan's options declare."""
        found = []
        for place in self._places:
            step = self._plan.step.wire(self._steps_case(tuple(sizes), place["step"]))
            takes_part = sum(size == 1 or place["step"] < size for size in sizes)
            case = self._cfg_case(takes_part, place["cfg"])
            if self._plan.step.guesses == "own":
                # Position r of a window is reached through r guesses.
                own = place["step"]
                case = replace(case, guesses=sum(own for size in sizes if own < size))
            found.append(step + self._plan.cfg.wire(case))
        return tuple(found)
