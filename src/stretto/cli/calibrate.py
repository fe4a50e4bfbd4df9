"""`stretto generate calibrate`: measure which windows suit a model, and write a plan file."""

from __future__ import annotations

import inspect
import json as jsonlib
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter, validators
from rich.console import Console
from rich.table import Table

from stretto import documents
from stretto.cli.generate_options import MODEL, Scale, Seed
from stretto.cli.limits import COUNT, check_threads
from stretto.cli.whole import AT_LEAST_1, whole, wholes
from stretto.diffusion.arguments import naming_arguments
from stretto.diffusion.calibrate import calibrate as measure
from stretto.diffusion.calibration import Calibration, Entry, write_calibration
from stretto.diffusion.folder import open_pipeline
from stretto.diffusion.output import finite
from stretto.errors import ConfigError, UnsupportedPipeline

_MANY = Parameter(consume_multiple=True)
_NUMBERS = Parameter(consume_multiple=True, converter=wholes)


def calibrate(
    folder: str = MODEL,
    /,
    *,
    degree: Annotated[int, Parameter(converter=whole, validator=validators.Number(gte=2))] = 4,
    depth: Annotated[list[int] | None, _NUMBERS] = None,
    steps: Annotated[int, COUNT] = 50,
    guidance_scale: Scale = None,
    classes: Annotated[list[int] | None, _NUMBERS] = None,
    prompt: Annotated[list[str] | None, _MANY] = None,
    calls: Annotated[int, COUNT] = 4,
    holdout: Annotated[int, COUNT] = 4,
    seed: Seed = 0,
    threads: Annotated[int, AT_LEAST_1] = 1,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("calibration.yaml"),
    json: bool = False,
) -> int:
    """Measure window plans for step ranks, verify them, and write a calibration file.

    Runs in one process. Takes the time of (1 + 2 degree) x calls + 9 x holdout x depths
    generations; the shipped models need two to four minutes. Errors of single pictures differ by
    30 dB: few calls, or calls of one kind, make plans that suit only those.

    Parameters
    ----------
    folder
        A local diffusers pipeline, or a shipped model: dit, unet.
    degree
        Step ranks that the plan is for.
    depth
        Sequential evaluations to find plans for; by default that of the published schedule and
        its two neighbours.
    steps
        Denoising steps; a plan holds for this number only.
    guidance_scale
        By default the pipeline's own.
    classes
        Classes of the pictures in turn: first those of the calls, then the held-out ones. By
        default both spread evenly over all classes.
    prompt
        Prompts in turn, for pipelines that take text.
    calls
        Generations that are measured, one item each.
    holdout
        Generations that the plans are verified on.
    seed
        Seed of the first generation; each takes the next.
    threads
        CPU threads. Ranks on a CPU have one each, so with one the results are bitwise theirs;
        more pay for large models, and cost dearly where other work holds the cores.
    out
        Where the calibration is written.
    json
        Print one JSON object.
    """
    documents.check_writable(out)
    check_threads(threads)
    torch.set_num_threads(threads)
    pipe = open_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    subjects = _subjects(pipe, classes, prompt, calls, holdout)
    requests = [_request(subject, seed + index, options) for index, subject in enumerate(subjects)]
    given = {"degree": degree, "depths": depth, "holdout": requests[calls:]}
    shown = {**subjects[0], "num_inference_steps": steps}
    started = time.perf_counter()
    console = Console(stderr=True)
    with console.status("measuring") as status, naming_arguments(pipe, shown):
        found = measure(pipe, requests[:calls], **given, say=status.update)
    seconds = time.perf_counter() - started
    write_calibration(found, out)
    if json:
        document = {"file": str(out), "seconds": seconds, **found.model_dump(mode="json")}
        print(jsonlib.dumps(finite(document), indent=2, allow_nan=False))
    else:
        _show(found, out, seconds)
    return 0


def _subjects(
    pipe: Any, classes: list[int] | None, prompt: list[str] | None, calls: int, holdout: int
) -> list[dict[str, Any]]:
    """What each generation shows, as arguments of the pipeline's call."""
    count = calls + holdout
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "class_labels" in accepted and prompt is None:
        wanted = classes or _spread(getattr(pipe, "num_classes", 1), calls, holdout)
        return [{"class_labels": [wanted[index % len(wanted)]]} for index in range(count)]
    if "prompt" in accepted and classes is None:
        if not prompt:
            raise ConfigError(f"{type(pipe).__name__} takes text: pass --prompt, once or more")
        return [{"prompt": prompt[index % len(prompt)]} for index in range(count)]
    raise UnsupportedPipeline(
        f"{type(pipe).__name__} cannot be called with "
        f"{'--classes' if classes else '--prompt' if prompt else 'classes or prompts alone'}: it "
        f"takes {', '.join(name for name in accepted if name != 'self')}\n"
        "  to fix: stretto.diffusion.calibrate.calibrate(pipe, calls, ...) takes calls of any form"
    )


def _spread(num_classes: int, calls: int, holdout: int) -> list[int]:
    """Classes for the calls, evenly spaced from the first one; held-out ones lie in between."""
    measured = [index * num_classes // calls for index in range(calls)]
    return measured + [(2 * index + 1) * num_classes // (2 * holdout) for index in range(holdout)]


def _request(subject: dict[str, Any], seed: int, options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    return {**subject, **given, "generator": generator, "output_type": "np"}


def _show(found: Calibration, out: Path, seconds: float) -> None:
    table = Table(title=f"{found.steps} steps on {found.degree} step ranks, PSNR in dB")
    for name in ("depth", "ceiling", "verified", "tail", "parastep", "predicted", "guesses"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in found.frontier:
        table.add_row(*_row(entry, found.steps))
    console, evidence = Console(), found.evidence
    console.print(table)
    for entry in found.frontier:
        windows = " ".join(map(str, entry.windows))
        console.print(f"windows at depth {entry.depth}: {windows}", soft_wrap=True)
    console.print(
        f"Verified, tail and parastep: against sequential, {len(evidence.holdout)} generation(s) "
        f"not used for planning, data range {evidence.data_range:.4g}, noise floor "
        f"{evidence.floor_db:.1f} dB. Predicted: mean squared error of latents that the windows "
        "add.",
        soft_wrap=True,
    )
    console.print(f"written: {out}, after {seconds:.0f} s", soft_wrap=True)


def _row(entry: Entry, steps: int) -> list[str]:
    return [
        str(entry.depth),
        f"{steps / entry.depth:.2f}x",
        f"{entry.verified_db:.1f}",
        f"{entry.tail_db:.1f}",
        f"{entry.parastep_db:.1f}",
        f"{entry.predicted:.1e}",
        "stored" if entry.damping else entry.predictor,
    ]
