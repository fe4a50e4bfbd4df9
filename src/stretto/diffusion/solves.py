"""Linear systems that a scheduler's step solves, without the host waiting for the device.

`torch.linalg.solve` asks the device whether its matrix was singular, so in every step of UniPC the
host waits for all that is queued, the denoiser too, and what comes after is queued while the device
stands idle. `solve_ex` has the same bits and hands the answer out. A singular matrix makes infinite
latents, which the next prediction shows; after the last step only the answer tells.
"""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor


class _Instead:
    """A module, with some names of its own."""

    def __init__(self, module: Any, **names: Any):
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Solves:
    """The methods of a scheduler that solve linear systems, in a form that asks for no answer."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        self._answers: list[Tensor] = []
        self._torch = _Instead(torch, linalg=_Instead(torch.linalg, solve=self._solve))
        self._methods = {
            name: MethodType(self._unasking(function), scheduler)
            for name, function in inspect.getmembers_static(type(scheduler), inspect.isfunction)
            if {"torch", "linalg", "solve"} <= {*function.__code__.co_names}
        }

    def on(self, device: torch.device) -> dict[str, MethodType]:
        """By name, bound to the scheduler; none where nobody waits, none the instance replaced."""
        if device.type == "cpu":
            return {}
        own = vars(self._scheduler)
        return {name: method for name, method in self._methods.items() if name not in own}

    def forget(self) -> None:
        """Of a call that did not end."""
        self._answers.clear()

    def check(self) -> None:
        """Raises torch.linalg.LinAlgError if a matrix was singular since the call began."""
        answers = [answer.flatten() for answer in self._answers]
        self.forget()
        if answers and bool(torch.cat(answers).any()):
            raise torch.linalg.LinAlgError(
                "a scheduler's step solved a linear system whose matrix is singular\n"
                "  why: two of its noise levels are equal, or they do not fall\n"
                "  to fix: other timesteps or sigmas, or a scheduler of lower order"
            )

    def _solve(self, *args: Any, **kwargs: Any) -> Tensor:
        result, answer = torch.linalg.solve_ex(*args, **kwargs)
        self._answers.append(answer)
        return result

    def _unasking(self, function: FunctionType) -> FunctionType:
        """The same code, which finds this object's `torch`."""
        names = {**function.__globals__, "torch": self._torch}
        made = FunctionType(
            function.__code__,
            names,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        made.__kwdefaults__ = function.__kwdefaults__
        return made
