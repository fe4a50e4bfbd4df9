"""How gradients of blocks come home: riding on with them, to their owners, or all at once."""

from __future__ import annotations

from stretto.ops.attention.block import Block
from stretto.ops.attention.job import Arrival, Job
from stretto.ops.attention.rows import summed
from stretto.plan.moves import Pass, Step


def returning(job: Job, plan: Pass) -> Riding | Owners | AtOnce:
    if plan.ride:
        return Riding(job)
    if job.schedule.context.schedule.kind == "gather":
        return AtOnce(job)
    return Owners(job, plan)


class Riding:
    """Gradients that travel on with their block: a rank adds its part to what came with it."""

    def __init__(self, job: Job):
        self.job = job
        self.coming: Arrival | None = None
        self.sum: Block | None = None

    def add(self, step: Step, part: Block) -> None:
        rows = next(iter(step.give.sends.values())) if step.give else part.rows
        if rows != part.rows:  # pruned keys: gradients ride with all rows
            whole = self.job.sums(rows, *part.parts)
            whole.add_(part)
            part = whole
        if self.coming is not None:
            part.add_(self.coming.one())
        self.sum = part
        if step.give:
            wire = self.job.wire if step.give.tensors[0] == "dk" else self.job.dtype
            self.coming = self.job.hand(step.give, part.cast(wire))

    def home(self) -> Block:
        """The sum of this rank's own block, back from its round."""
        if self.coming is not None:
            return self.coming.one().cast(self.job.wide)
        assert self.sum is not None, "a walk has steps"
        return self.sum


class AtOnce:
    """Gradients of all blocks, computed in one step, to all owners in one exchange."""

    def __init__(self, job: Job):
        self.job = job
        self.sum: Block | None = None

    def add(self, step: Step, part: Block) -> None:
        own = self.job.schedule.kv
        self.sum = part.select(own)
        if step.give:
            self.sum = summed(self.job, [step.give], part)

    def home(self) -> Block:
        assert self.sum is not None, "a walk has steps"
        return self.sum


class Owners:
    """Gradients straight to their owners, who add them in order of delivery, their own first.

    On two levels the parts of one circle meet at a delegate, who sends their sum on. Messages are
    in flight under the next step or circle.
    """

    def __init__(self, job: Job, plan: Pass):
        self.job = job
        self.sums: Block | None = None
        self.turns = iter(plan.turns)
        self.left = 0
        self.circle: Block | None = None
        self.inner: Arrival | None = None
        self.outer: Arrival | None = None

    def add(self, step: Step, part: Block) -> None:
        if not self.left:
            self.turn = next(self.turns)
            self.left = len(self.turn.steps)
            self.circle = self._begun(part)
        elif step.give:
            self._collect_inner()
            self.inner = self.job.hand(step.give, part.cast(self.job.wire))
        self.left -= 1
        if not self.left:
            self._collect_inner()
            self._end_circle()

    def home(self) -> Block:
        self._collect_outer()
        assert self.sums is not None, "a walk has turns"
        return self.sums

    def _begun(self, part: Block) -> Block:
        """The sum for the block that this rank is delegate of on this circle."""
        give = self.turn.give
        rows = next(iter(give.sends.values())) if give else self.job.schedule.kv
        if rows == part.rows:
            return part
        sums = self.job.sums(rows, "dk", "dv")
        sums.add_(part.among(rows))
        return sums

    def _collect_inner(self) -> None:
        if self.inner is not None:
            assert self.circle is not None, "a circle has begun"
            self.circle.add_(self.inner.one())
            self.inner = None

    def _collect_outer(self) -> None:
        if self.outer is not None:
            assert self.sums is not None, "a rank's own circle comes first"
            self.sums.add_(self.outer.one())
            self.outer = None

    def _end_circle(self) -> None:
        assert self.circle is not None, "a circle has begun"
        if self.turn.give is None:
            self.sums = self.circle
            return
        self._collect_outer()
        self.outer = self.job.hand(self.turn.give, self.circle.cast(self.job.wire))
