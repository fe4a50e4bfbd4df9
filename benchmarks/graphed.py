"""A module's forward as CUDA graphs, one per form of call: no script.

A small denoiser on a slice of a GPU otherwise waits for its host: 1500 launches take longer than
the kernels. Every row of a benchmark, the sequential one first, runs the same graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Graphed:
    """Stands in for `module.forward`; a form is the shapes of tensors and all other arguments.

    Arguments are plain values, tensors, or sequences of them that keep their tensors' shapes. The
    result is a copy, so that a later call does not overwrite it.
    """

    def __init__(self, module: torch.nn.Module):
        self._forward = module.forward
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = _tensors((args, kwargs))
        form = _form((args, kwargs))
        if form not in self._graphs:
            self._graphs[form] = self._capture(args, kwargs)
        graph, static, output = self._graphs[form]
        for own, given in zip(static, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return _mapped(output, Tensor.clone)

    def _capture(self, args: tuple, kwargs: dict) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        args, kwargs = _mapped((args, kwargs), Tensor.clone)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._forward(*args, **kwargs)
        return graph, _tensors((args, kwargs)), output


def graph(pipe: Any, denoiser: str) -> None:
    """Run a pipeline's denoiser as graphs from now on."""
    module = getattr(pipe, denoiser)
    module.forward = Graphed(module)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device.type)
    if isinstance(value, dict):
        return tuple((name, _form(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return value


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((name, _mapped(item, change)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return value
