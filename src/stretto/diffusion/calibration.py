"""Calibrated window plans: the file, what it was made for, and the plan it resolves to.

A calibration holds a frontier: for each depth the windows, predictor and damping that came
closest to the sequential result on calls that were not used for planning.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from stretto.diffusion.adapters import denoisers_of
from stretto.errors import PlanMismatch, StrettoError
from stretto.mesh.mesh import Mesh
from stretto.plan.io import read_document, write_document
from stretto.plan.model import Plan
from stretto.plan.options import Calibrated, Listed, Steps
from stretto.search import windows as search

SCHEMA = "calibration/1"


def _parted(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


def _joined(values: tuple) -> str:
    return " ".join(map(str, values))


_LINE = (BeforeValidator(_parted), PlainSerializer(_joined))
#: Number lists stand on one line of the file, as "1 8 8 4": a list would take a line per number.
Sizes = Annotated[tuple[int, ...], *_LINE]
Fractions = Annotated[tuple[float, ...], *_LINE]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Strict):
    """The best plan found at one depth, and what it was measured against.

    `predicted`: mean squared error of latents that its windows add, each started from true
    latents, summed. `*_db`: PSNR against the sequential result over the held-out calls, inf where
    equal. `tail_db`: the analytic schedule with the damping fitted online. `parastep_db`: the
    published schedule with the warmup that gives this depth. `damping` empty: fitted online.
    """

    depth: int
    windows: Sizes
    predictor: str
    damping: Fractions = ()
    predicted: float
    verified_db: float
    tail_db: float
    parastep_db: float


class Evidence(_Strict):
    """How a calibration was measured.

    `floor_db`: PSNR of the sequential computation against itself with another batch composition.
    `data_range`: the largest possible difference that the PSNRs refer to.
    """

    calls: tuple[dict[str, Any], ...]
    holdout: tuple[dict[str, Any], ...]
    guidance: bool | None
    data_range: float
    floor_db: float
    dtype: str
    device: str
    date: str
    versions: dict[str, str]
    basis: str = "measured"


class Calibration(_Strict):
    """Measured window plans of one pipeline, scheduler, noise grid and step degree.

    `subject` is what `fingerprint` returned. `noise` holds s_0 .. s_N. `damping[h-1]` is the
    least-squares damping of the prediction h steps ahead.
    """

    subject: dict[str, str]
    degree: int
    steps: int
    noise: Fractions
    damping: Fractions
    frontier: tuple[Entry, ...]
    evidence: Evidence

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(entry.depth for entry in self.frontier)

    @property
    def command(self) -> str:
        """What makes such a file anew."""
        return f"stretto generate calibrate FOLDER --degree {self.degree} --steps {self.steps}"

    def entry(self, depth: int | None = None) -> Entry:
        """The plan at a depth, by default that of `Parastep()`. Raises PlanMismatch."""
        wanted = search.default_depth(self.steps, self.degree) if depth is None else depth
        for entry in self.frontier:
            if entry.depth == wanted:
                return entry
        raise PlanMismatch(
            f"depth {wanted} is not in the calibration, it has {_joined(self.depths)}\n"
            f"  to fix: one of these depths, or {self.command} --depth {wanted}"
        )

    def option(self, entry: Entry) -> Listed:
        """An entry's windows as the option of a plan, bound to this noise grid."""
        return Listed(sizes=entry.windows, damping=entry.damping, grid=self.noise)


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration file. Raises ConfigError (no file, no YAML), PlanMismatch (fields)."""
    return _parse(read_document(path, SCHEMA), str(path))


def write_calibration(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration file; an existing file is replaced at once or not at all."""
    write_document(calibration.model_dump(mode="json"), path, SCHEMA)


def fingerprint(pipe: Any, *, denoiser: str | None = None) -> dict[str, str]:
    """What a calibration depends on: class names and configuration hashes, by component.

    Weights are left out: plans carry over between them, as between guidance scales.
    """
    found = {"pipeline": _class_of(pipe)}
    parts = {**denoisers_of(pipe, denoiser), "scheduler": pipe.scheduler}
    for name, part in parts.items():
        found[name] = _class_of(part)
        found[f"{name} config"] = _digest(_config_of(part))
    return found


def resolved(
    plan: Plan, pipe: Any, *, mesh: Mesh | None = None, denoiser: str | None = None
) -> Plan:
    """The plan with a calibration file's windows written out; other plans unchanged.

    All ranks of `mesh` take rank 0's file. Raises ConfigError for a file that cannot be read,
    PlanMismatch naming every difference between what was calibrated and what is to run. The noise
    grid is compared when the first step has set it.
    """
    option = plan.step.windows
    if not isinstance(option, Calibrated):
        return plan
    known = _shared(option.file, mesh)
    check(known, plan.step, fingerprint(pipe, denoiser=denoiser), source=option.file)
    entry = known.entry(option.depth)
    steps = replace(plan.step, windows=known.option(entry), predictor=entry.predictor)
    return plan.model_copy(update={"step": steps})


def check(known: Calibration, steps: Steps, subject: Mapping[str, str], *, source: str) -> None:
    """Raise PlanMismatch, naming each field that differs, unless the calibration is of this."""
    wanted = {**subject, "degree": str(steps.degree)}
    held = {**known.subject, "degree": str(known.degree)}
    lines = [
        f"{name}: {wanted.get(name, 'absent')} here, {held.get(name, 'absent')} in the file"
        for name in {**wanted, **held}
        if wanted.get(name) != held.get(name)
    ]
    # Of Steps' default nobody can say whether it was asked for; anything else was.
    if steps.predictor not in (Steps().predictor, *(e.predictor for e in known.frontier)):
        lines.append(f"predictor: {steps.predictor} here, the file brings its own")
    if lines:
        raise PlanMismatch(
            f"{source} was calibrated for something else\n  "
            + "\n  ".join(lines)
            + "\n  why: windows and damping were measured on that, and mean nothing here\n"
            f"  to fix: calibrate anew, stretto generate calibrate FOLDER --degree {steps.degree} "
            f"--steps {known.steps}"
        )


def check_file(steps: Steps) -> None:
    """Raise what `resolved` would that needs no pipeline; nothing where no file is named."""
    option = steps.windows
    if isinstance(option, Calibrated):
        known = read_calibration(option.file)
        check(known, steps, known.subject, source=option.file)
        known.entry(option.depth)


def _parse(fields: dict, source: str) -> Calibration:
    try:
        known = Calibration.model_validate(fields)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise PlanMismatch(
            f"{source} is no calibration: {'; '.join(lines)}\n"
            "  to fix: write it anew with stretto generate calibrate"
        ) from None
    if len(known.noise) != known.steps + 1:
        raise PlanMismatch(
            f"{source}: {known.steps} steps, but {len(known.noise)} noise fractions "
            f"(one more than steps is right); write it anew with {known.command}"
        )
    for entry in known.frontier:
        search.check(entry.windows, known.steps, known.degree)
        # Fewer are right: where errors are zero, a plan takes larger windows than it has to.
        if len(entry.windows) > entry.depth:
            raise PlanMismatch(
                f"{source}: the entry of depth {entry.depth} has {len(entry.windows)} windows: "
                f"{_joined(entry.windows)}\n"
                "  why: windows follow one another, and depth is how many may\n"
                f"  to fix: write it anew with {known.command}"
            )
    return known


def _shared(path: str, mesh: Mesh | None) -> Calibration:
    """The file as rank 0 reads it, also where it cannot: then every rank raises the same."""
    if mesh is None or mesh.world_size == 1:
        return read_calibration(path)
    message: dict[str, Any] = {}
    if mesh.world_rank == 0:
        try:
            message = {"fields": read_calibration(path).model_dump(mode="json")}
        except StrettoError as error:
            message = {"failed": str(error)}
    message = json.loads(mesh.broadcast_bytes(json.dumps(message).encode()))
    if "failed" in message:
        raise PlanMismatch(f"rank 0: {message['failed']}")
    return _parse(message["fields"], path)


def _class_of(part: Any) -> str:
    return type(part).__name__


def _config_of(part: Any) -> dict[str, Any]:
    """Configuration without bookkeeping; of a plain module the shapes of its parameters."""
    config = getattr(part, "config", None)
    if config is None and isinstance(part, torch.nn.Module):
        return {name: list(value.shape) for name, value in part.named_parameters()}
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return {key: value for key, value in config.items() if not str(key).startswith("_")}


def _digest(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]
