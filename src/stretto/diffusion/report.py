"""What one generation did: windows, depth, evaluations, bytes, and the error of every guess."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.mesh.count import CountingMesh
from stretto.mesh.mesh import Mesh
from stretto.plan.model import Plan
from stretto.plan.traffic import Traffic


@dataclass(slots=True)
class WindowRecord:
    """A window that closed. `discrepancy` is the worst relative guess error of its positions.

    rms(true latent - latent the prediction was evaluated on) / rms(true latent); None where it is
    not measured (leader walk). `seconds` is host time on this rank, exchange and replay included.
    """

    start: int
    size: int
    seconds: float
    discrepancy: float | None = None


class Report:
    """The numbers of one generation on this rank; `close` makes the errors those of all ranks.

    Steps are numbered through, also where a pipeline sets its timesteps anew, section by section.
    `evaluations`: denoiser calls that this rank's part of the plan asks for. `structure_calls`:
    calls made besides, to learn the form of an output, the first time a form occurs, or to hold a
    batch that is cut for the first time against the whole.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.walk = "replay"
        self.num_steps = 0
        self.guided_bytes = 0
        self.evaluations = 0
        self.structure_calls = 0
        self.windows: list[WindowRecord] = []
        self.traffic = Traffic()
        self.network_calls = 0
        self._own_errors: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(window.size for window in self.windows)

    @property
    def depth(self) -> int:
        """Sequential rounds of denoiser evaluations: the number of windows."""
        return len(self.windows)

    @property
    def ceiling(self) -> float:
        """Speed-up of the step axis if exchange and guesses cost nothing: steps / depth."""
        return self.num_steps / self.depth if self.depth else 1.0

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank sent to others for this generation, headers and report included."""
        return self.traffic.total()

    @property
    def worst_discrepancy(self) -> float:
        return max((w.discrepancy for w in self.windows if w.discrepancy is not None), default=0.0)

    def as_dict(self) -> dict:
        """Plain data for a result file."""
        return {
            "plan": str(self.plan),
            "walk": self.walk,
            "steps": self.num_steps,
            "depth": self.depth,
            "ceiling": self.ceiling,
            "evaluations": self.evaluations,
            "structure_calls": self.structure_calls,
            "network_calls": self.network_calls,
            "bytes_sent": self.bytes_sent,
            "bytes_by_phase": _by_phase(self.traffic),
            "windows": [
                {"start": w.start, "size": w.size, "seconds": w.seconds, "error": w.discrepancy}
                for w in self.windows
            ],
        }

    def __str__(self) -> str:
        return (
            f"{self.plan}: {self.num_steps} steps in depth {self.depth} "
            f"(ceiling {self.ceiling:.2f}x), {self.evaluations} evaluations and "
            f"{self.bytes_sent} bytes sent on this rank, worst guess error "
            f"{self.worst_discrepancy:.2%}, walk {self.walk}"
        )

    # ---- filled by the run -----------------------------------------------------------------

    def begin(self, num_steps: int, guided: Tensor) -> None:
        self.num_steps = num_steps
        self.guided_bytes = guided.numel() * guided.element_size()

    def count(self, runs: int, *, planned: bool) -> None:
        if planned:
            self.evaluations += runs
        else:
            self.structure_calls += runs

    def own_error(self, position: int, error: Tensor, scale: Tensor) -> None:
        """Norm of the error of the latents that this rank evaluated on, and of the true ones."""
        # Kept as tensors: reading them would wait for the device inside the loop.
        self._own_errors[position] = error.detach(), scale.detach()

    def add(self, record: WindowRecord) -> None:
        self.windows.append(record)

    def shared_errors(self, mesh: Mesh, start: int, size: int) -> list[float]:
        """The window's errors per position, equal on all ranks; 8 bytes per rank."""
        norms = self._own_errors.get(start + mesh.rank("step"))
        mine = _relative(*torch.stack(norms).tolist()) if norms else 0.0
        told = torch.tensor([mine], dtype=torch.float64, device="cpu")
        parts = mesh.all_gather(told, "step", "adaptive")
        return [float(part) for part in parts.wait()[:size]]

    def close(self, mesh: CountingMesh) -> None:
        """Collect the guess errors of all step ranks: 8 bytes per step and rank."""
        own = [0.0] * self.num_steps
        if self._own_errors:
            # Read together: one wait for the device, not two a window.
            found = torch.stack([norm for norms in self._own_errors.values() for norm in norms])
            for position, norms in zip(self._own_errors, found.view(-1, 2).tolist(), strict=True):
                own[position] = _relative(*norms)
        told = torch.tensor(own, dtype=torch.float64, device="cpu")
        errors = [part.tolist() for part in mesh.all_gather(told, "step", "report").wait()]
        for window in self.windows:
            if window.size > 1 and self.walk == "replay":
                positions = range(window.size)
                window.discrepancy = max(errors[p][window.start + p] for p in positions)
        self.traffic = mesh.traffic
        self.network_calls = sum(mesh.calls.values())


def _relative(error: float, scale: float) -> float:
    return error / max(scale, 1e-30)


def _by_phase(traffic: Traffic) -> dict[str, int]:
    phases = sorted({lane.phase for lane, _ in traffic})
    return {phase: traffic.total(phase=phase) for phase in phases}
