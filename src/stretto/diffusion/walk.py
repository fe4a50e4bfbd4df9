"""How a rank gets through a window: what both walks share, on the way to its own position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from stretto.diffusion.scheduler import StepCall

if TYPE_CHECKING:
    from stretto.diffusion.steps import StepRun


class Walk(ABC):
    """A way through the windows of one generation; `run` is the generation on this rank."""

    name: ClassVar[str]

    def __init__(self, run: StepRun):
        self.run = run

    @abstractmethod
    def step(self, call: StepCall, inside: int) -> Any:
        """What the pipeline gets for the scheduler step at position `inside` of the window."""

    def toward_own(self, call: StepCall, inside: int) -> Any:
        """Walk with guesses up to this rank's own position, then stand still."""
        run = self.run
        if inside >= run.rank or run.rank >= run.window.size:
            return run.port.unmoved(call)
        own = call.guided
        if run.predictor.needs_own_output and run.branches.holds_whole_calls:
            own = run.branches.led(own)
        guess = run.predictor.guess(run.noise[run.position], inside + 1, own_output=own)
        return run.port.real(call.replaced(model_output=guess))
