"""The leader walk: rank 0 takes each true step as its prediction arrives.

For pipelines that edit latents between steps, which a replay of scheduler steps would leave out.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from stretto.diffusion import exchange
from stretto.diffusion.scheduler import StepCall
from stretto.diffusion.walk import Walk
from stretto.mesh.mesh import Mesh


class Leader(Walk):
    """Rank 0's latents alone are true inside a window; its result reaches all at the end."""

    name = "leader"

    def step(self, call: StepCall, inside: int) -> Any:
        run = self.run
        is_last = inside == run.window.size - 1
        if inside and run.rank in (0, inside):
            # A network that predicts variances too leaves every other channel out.
            guided = call.guided.contiguous()
            moved = run.mesh.permute(guided, "step", {inside: 0}, "window").wait()
            call = call if moved is None else call.replaced(model_output=moved)
        if run.rank == 0:
            exchange.check_finite(call.guided, run.position, run.deferred, rank=0)
            result = run.port.real(call)
            run.window.trues.append(call.guided)
            return self._share(result) if is_last else result
        return self._share(None) if is_last else self.toward_own(call, inside)

    def _share(self, result: Any) -> Any:
        """Rank 0's step result, scheduler and generator states, and history, on every rank."""
        run = self.run
        run.mesh.record(f"window {run.window.index}: waiting for rank 0", waiting=True)
        content = None
        if run.rank == 0:
            content = {
                "result": result,
                "state": _sent(run.port.exported()),
                "random": run.randomness.snapshot(),
                "guided": run.window.trues,
            }
        content = _broadcast_object(run.mesh, content, run.mesh.device)
        if run.rank:
            run.port.restore({**run.port.exported(), **content["state"]})
            run.randomness.restore(content["random"])
        run.learn(content["guided"])
        return content["result"]


def _sent(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what no pickle takes; every rank has its own of that.

    Functions made inside functions, as SA-Solver keeps, and sources of noise that hold some.
    """
    return {name: value for name, value in state.items() if _is_pickled(value)}


def _is_pickled(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, list, tuple, int, float, str, type(None))):
        return True
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _broadcast_object(mesh: Mesh, content: dict | None, device: torch.device) -> dict:
    """Rank 0's tensors and state on all step ranks; peers of one job trust each other's pickles."""
    buffer = io.BytesIO()
    if content is not None:
        torch.save(content, buffer)
    data = mesh.broadcast_bytes(buffer.getvalue(), "step")
    if content is not None:
        return content
    return torch.load(io.BytesIO(data), map_location=_onto(device), weights_only=False)


def _onto(device: torch.device) -> Callable:
    """Tensors of the host stay there, those of rank 0's device come to this rank's."""
    return lambda storage, where: storage if where == "cpu" else storage.to(device.type)
