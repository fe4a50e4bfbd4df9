"""The replay walk: every rank takes all true steps of a window, once the predictions are gathered.

Scheduler and generators go back to the window's start, so that histories and draws are those of
the sequential run, on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion import exchange
from stretto.diffusion.exchange import Header
from stretto.diffusion.scheduler import StepCall
from stretto.diffusion.walk import Walk


class Replay(Walk):
    """Guesses up to the own position, an exchange at the end, then the true steps."""

    name = "replay"

    def step(self, call: StepCall, inside: int) -> Any:
        if 0 < inside == self.run.rank < self.run.window.size - 1 and self.carries:
            self.run.window.own_state = self.run.state()
        if inside == self.run.window.size - 1:
            return self.close()
        return self.toward_own(call, inside)

    def close(self) -> Any:
        """Gather, go back to the window's start, take every true step; the last one's result."""
        run, window = self.run, self.run.window
        run.mesh.record(f"window {window.index}: waiting for predictions", waiting=True)
        like = window.calls[0].guided
        guided = exchange.gather(run.mesh, window.guided, like, self._header(like), run.deferred)
        guesses = self._guessed_latents() if self.carries else None
        if guesses is None:
            # What was gathered is what is true: it is learned from beside the steps.
            run.learn(guided)
        self.rewind()
        result: Any = None
        trues: list[Tensor] = []
        for inside, (call, true) in enumerate(zip(window.calls, guided, strict=True)):
            if inside:
                call = run.handover.continued(call, result)
            self._measure(inside, call.sample)
            if guesses is not None and inside:
                # The first position has guessed nothing yet: its latents are the true ones.
                true = self.carried(true, call.sample, guesses[inside], window.start + inside)
            result = run.port.real(call.replaced(model_output=true))
            trues.append(true)
        if guesses is not None:
            run.learn(trues)
        return result

    def rewind(self) -> None:
        """Scheduler and generators as they were at the window's start."""
        state = self.run.window.state
        assert state is not None, "a window of several steps keeps its first state"
        self.run.restore(state)

    @property
    def carries(self) -> bool:
        """Whether predictions are carried from guessed to true latents; the published never are."""
        run = self.run
        here = run.noise[run.window.start]
        return not run.predictor.needs_own_output and run.port.carry(here) != 0

    @torch.no_grad()
    def carried(self, guided: Tensor, true: Tensor, guess: Tensor, position: int) -> Tensor:
        """A prediction made on `guess`, for the true latents; unchanged bits where they agree.

        The change of the latents is taken in their dtype, what is added in that of `guided`.
        """
        if guided.shape != true.shape:
            # Learned variances ride along in more channels: nothing is known of their change.
            return guided
        factor = self.run.port.carry(self.run.noise[position])
        # Equal latents differ by +0, and what is subtracted as +0 leaves even the sign of a zero.
        ahead = guess - true if factor > 0 else true - guess
        return torch.sub(guided, ahead, alpha=abs(factor), out=torch.empty_like(guided))

    def _guessed_latents(self) -> list[Tensor]:
        """The latents on which every position's prediction was evaluated.

        All ranks hold the history that guesses come from, so each walks them by itself: what the
        scheduler computes need not be sent. Up to its own position a rank has walked already.
        """
        run, window = self.run, self.run.window
        own = run.rank if run.rank < window.size else 0
        latents = [call.sample for call in window.calls[: own + 1]]
        if window.own_state is None:
            self.rewind()
        else:
            run.restore(window.own_state)
        call = window.calls[own]
        for inside in range(own, window.size - 1):
            result = run.port.real(call.replaced(model_output=run.guesses()[inside]))
            call = run.handover.continued(window.calls[inside + 1], result)
            latents.append(call.sample)
        return latents

    def _measure(self, inside: int, true: Tensor) -> None:
        """Error of the latents on which this rank evaluated its prediction."""
        window = self.run.window
        if inside != self.run.rank or window.own_latents is None:
            return
        with self.run.deferred.aside(true, window.own_latents):
            error, scale = _norms(true, window.own_latents)
        self.run.report.own_error(self.run.earlier + window.start + inside, error, scale)

    def _header(self, like: Tensor) -> Header:
        run, first = self.run, self.run.window.calls[0].sample
        return Header(
            rank=run.rank,
            start=run.window.start,
            size=run.window.size,
            dtype=str(like.dtype).removeprefix("torch."),
            device=like.device.type,
            shape=tuple(like.shape),
            digest=exchange.digest(first) if run.debug else bytes(16),
        )


def _norms(true: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of the error of a guess, and of what is true."""
    if not true.is_floating_point():
        # Tokens: their numbers are names, so one is right or wrong.
        true, guess = torch.ones_like(true, dtype=torch.float32), (true == guess).float()
    wide = torch.promote_types(true.dtype, torch.float32)
    error = torch.linalg.vector_norm(true - guess, dtype=wide)
    return error, torch.linalg.vector_norm(true, dtype=wide)
