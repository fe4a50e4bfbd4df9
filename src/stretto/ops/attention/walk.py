"""The walk down a column: which block is at hand, and the next one on its way."""

from __future__ import annotations

from collections.abc import Iterator

from stretto.ops.attention.block import Block
from stretto.ops.attention.job import Arrival, Job
from stretto.plan.moves import Pass, Step, Turn


class Walk:
    """Iterates over (step, block): blocks arrive while the one before is computed with."""

    def __init__(self, job: Job, plan: Pass, kept: list[Block]):
        self.job = job
        self.plan = plan
        self.kept = kept
        self.back = plan is job.schedule.backward
        self.block: Block | None = None
        self.crossing: Arrival | None = None
        self.coming: Arrival | None = None

    def begin(self, block: Block) -> None:
        """Set out with `block`, or what the schedule kept in its place; the next is on its way."""
        self.block = block
        self._enter(self.plan.turns[0])
        self._take(self.plan.turns[0].steps[0])

    def __iter__(self) -> Iterator[tuple[Step, Block]]:
        for turn in self.plan.turns:
            if turn is not self.plan.turns[0]:
                self._enter(turn)
            for step in turn.steps:
                if step is not self.plan.turns[0].steps[0]:
                    self._take(step)
                elif turn.hop and turn.hop.verb == "all_gather":
                    self._collect(step)
                assert self.block is not None, "a step has a block"
                self._keep(step, self.block)
                yield step, self.block
                self.block = self.coming.one() if self.coming else None
            if self.crossing:
                self.block = self.crossing.one()

    def _enter(self, turn: Turn) -> None:
        """Send on what the next turn begins with; with Gather, everything to everyone."""
        block, self.crossing = self._at(turn.steps[0]), None
        if turn.hop and turn.hop.verb == "shift":
            self.crossing = self.job.hand(turn.hop, block)
        elif turn.hop:
            sends = dict.fromkeys(turn.hop.sends, block)
            self.crossing = self.job.start(turn.hop, sends, block.specs)

    def _take(self, step: Step) -> None:
        """Make the step's block the one at hand, and send it on."""
        self.block = self._at(step)
        self.coming = self.job.hand(step.hop, self.block) if step.hop else None

    def _collect(self, step: Step) -> None:
        """The blocks of all ranks as one."""
        assert self.crossing is not None, "the exchange has begun"
        assert self.block is not None, "every rank has a block of its own"
        self.block = Block.joined(step.rows, [self.block, *self.crossing.wait().values()])
        self.crossing = None

    def _at(self, step: Step) -> Block:
        if step.kept and self.back and (self.block is None or self.block.rows != step.rows):
            return self.kept[0]
        assert self.block is not None, "no block came and none was kept"
        return self.block

    def _keep(self, step: Step, block: Block) -> None:
        if step.kept and self.back:
            self.kept.pop(0)
        elif step.kept:
            self.kept.append(block)
