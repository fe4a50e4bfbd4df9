"""How a rank gets through a window: what both walks share, on the way to its own position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

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
        return run.port.real(call.replaced(model_output=self._guess(call, inside)))

    def _guess(self, call: StepCall, inside: int) -> Tensor:
        run = self.run
        if not run.predictor.needs_own_output:
            return run.guesses()[inside]
        return run.branches.led(call.guided) if run.branches.holds_whole_calls else call.guided
