"""A pipeline's denoiser calls: how many, and how long each takes."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from stretto.diffusion.adapters import denoisers_of


class Clock:
    """While entered, `seconds` gets the duration of every denoiser call. Enter it before hooks.

    On one CPU thread it is the time computed, so that a busy neighbour does not count; elsewhere
    the time passed. On a GPU each call is waited for: measure calls, not whole generations.
    """

    def __init__(self, pipe: Any, denoiser: str | None = None):
        self.seconds: list[float] = []
        alone = torch.get_num_threads() == 1 and pipe.device.type == "cpu"
        self._now = time.thread_time if alone else time.perf_counter
        self._modules = list(denoisers_of(pipe, denoiser).values())

    def __enter__(self) -> Clock:
        for module in self._modules:
            vars(module)["forward"] = self._timed(module.forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for module in self._modules:
            vars(module).pop("forward")

    def _timed(self, original: Any) -> Any:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            result = original(*args, **kwargs)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds.append(self._now() - began)
            return result

        return forward


class Count:
    """While entered, `calls` counts denoiser calls."""

    def __init__(self, pipe: Any, denoiser: str | None = None):
        self.calls = 0
        self._modules = list(denoisers_of(pipe, denoiser).values())
        self._handles: list[Any] = []

    def __enter__(self) -> Count:
        self._handles = [m.register_forward_pre_hook(self._count) for m in self._modules]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, *ignored: object) -> None:
        self.calls += 1
