"""What a pipeline hands from one scheduler step to the next: latents, untouched, and extras."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.kept import Watched
from stretto.diffusion.randomness import Randomness
from stretto.diffusion.scheduler import StepCall, extras_of, sample_of


class Handover:
    """The result of the step before, and what of it the pipeline passes on."""

    def __init__(self, randomness: Randomness):
        self._randomness = randomness
        self._result: Any = None
        self._left: Watched | None = None
        self._given: Watched | None = None
        self._recurrent: dict[str, int] = {}
        #: Whether the pipeline wrote into latents after it had given them to a step.
        self.overwrites = False

    def leave(self, result: Any) -> None:
        """A step returned `result`; from here on random draws are the pipeline's own."""
        self._result = result
        left = Watched(sample_of(result))
        # Inference mode counts no writes: only a copy tells.
        self._left = left if left.is_counted else Watched(left.tensor.clone())
        self._randomness.mark()

    def find_recurrent(self, call: StepCall) -> None:
        """Note arguments that are an extra output of the step before, found by identity."""
        if self._result is None:
            return
        for k, extra in enumerate(extras_of(self._result)):
            # A scheduler may return its sample twice (TCD with eta 0): that is no extra.
            if not isinstance(extra, Tensor) or extra is sample_of(self._result):
                continue
            for name, value in call.named.items():
                if value is extra:
                    self._recurrent[name] = k

    def edited(self, call: StepCall) -> Tensor | None:
        """Did the pipeline change latents, or draw random numbers, since the step before?

        A tensor of one truth value on the device of the latents; None before the second step, and
        where the very tensor that the step returned comes back, unwritten. Where it was written
        into, what it held is gone: that counts as a change.
        """
        if self._left is None:
            return None
        held = self._left.tensor
        is_other = self._left.is_written or held.shape != call.sample.shape
        if is_other or self._randomness.moved():
            return torch.ones((), dtype=torch.bool)
        if held is call.sample:
            return None
        return (held.to(call.sample.dtype) != call.sample).any()

    def lasting(self, call: StepCall) -> StepCall:
        """The call on latents that stay as they are, so that a replay can step them again.

        A pipeline may write what a step returned into the latents it gave (Kandinsky 5 does). One
        that does is known by its first step; from then on, and in inference mode, they are copied.
        """
        if self._given is not None and self._given.is_written:
            self.overwrites = True
        self._given = Watched(call.sample)
        if self.overwrites or not self._given.is_counted:
            return call.replaced(sample=call.sample.clone())
        return call

    def continued(self, call: StepCall, result: Any) -> StepCall:
        """A recorded call on the true sample, cast as the pipeline cast it, with carried extras."""
        carried = {name: extras_of(result)[k] for name, k in self._recurrent.items()}
        return call.replaced(sample=sample_of(result).to(call.sample.dtype), **carried)
