"""`stretto generate`: start ranks, run one plan or compare several, write what comes back.

What can be checked without loading a model is checked first; the ranks' server warms up meanwhile.
Nothing here imports torch before that server runs.
"""

from __future__ import annotations

import contextlib
import difflib
import json as jsonlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

import stretto
from stretto.cluster import detect
from stretto.errors import ConfigError, PlanMismatch
from stretto.mesh.launch import launch, prepare
from stretto.plan.io import read_plan
from stretto.plan.model import Plan
from stretto.plan.options import (
    PREDICTORS,
    Adaptive,
    Calibrated,
    Fixed,
    Guidance,
    Parastep,
    Steps,
    Tail,
    Windows,
)

if TYPE_CHECKING:
    from stretto.diffusion.generate import Job, Outcome

app = App(name="generate", help="Generate pictures, video or sound on several ranks.")

SCHEDULES = {"tail": Tail, "parastep": Parastep, "fixed": Fixed, "adaptive": Adaptive}
#: Imported by the ranks' server: what every job needs, besides torch.
PRELOAD = ("stretto.diffusion.compare", "stretto.diffusion.shipped.load")
#: Pictures of the shipped models where no classes are asked for: about 15 s on one CPU thread.
DEFAULT_CLASSES = tuple(range(8))

_Degree = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
_Positive = Annotated[int, Parameter(validator=validators.Number(gte=1))]
_Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Split:
    """How the work is split over ranks.

    Parameters
    ----------
    ranks
        Processes to start; by default what the plan asks for, else 1.
    step
        Ranks that share the denoising steps (approximate, error reported).
    cfg
        Ranks that share the two branches of guidance (exact). Neither --step nor --cfg: two ranks
        for cfg where guidance is on and the ranks are even, the rest for step.
    windows
        Where exact steps lie: tail, parastep, fixed, adaptive, or a calibration file.
    depth
        Sequential evaluations of the schedule, for tail and calibration files.
    predictor
        How predictions in between are guessed: damped, repeat, own, taylor-1, taylor-2, taylor-3.
    plan
        A plan file, in place of the five options above.
    emulate
        Play all ranks in this process: the same result, not the same time.
    """

    ranks: _Degree = None
    step: _Degree = None
    cfg: _Degree = None
    windows: str | None = None
    depth: _Degree = None
    predictor: str | None = None
    plan: Path | None = None
    emulate: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the pipeline is asked for.

    Parameters
    ----------
    steps
        Denoising steps.
    guidance_scale
        Strength of guidance; by default the pipeline's own.
    seed
        Seed of the first item; with classes, each item takes the next.
    prompt
        Text, for pipelines that take it.
    classes
        Classes of the pictures, as in 0,3,9.
    arguments
        Another argument of the pipeline, as in height=256; values are JSON or text, and @file
        stands for a picture or a .npy array. May be given several times.
    denoiser
        Component that denoises, where stretto does not recognise it.
    """

    steps: _Positive = 50
    guidance_scale: float | None = None
    seed: int = 0
    prompt: str | None = None
    classes: str | None = None
    arguments: Annotated[tuple[str, ...], Parameter(name="--set", show_default=False)] = ()
    denoiser: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """On what, and for how long.

    Parameters
    ----------
    dtype
        float32, bfloat16 or float16.
    device
        cpu or cuda; by default a GPU per rank where there is one.
    timeout
        Seconds without any progress after which the ranks are given up.
    threads
        Threads of each rank; by default 1, or all cores for a single rank.
    """

    dtype: str = "float32"
    device: str | None = None
    timeout: _Seconds = 300.0
    threads: _Degree = None


_SPLIT, _SUBJECT, _MACHINE = Split(), Subject(), Machine()


@app.default
def generate(
    folder: str = "dit",
    /,
    *,
    split: Split = _SPLIT,
    subject: Subject = _SUBJECT,
    machine: Machine = _MACHINE,
    compare: bool = False,
    repeats: Annotated[int, Parameter(validator=validators.Number(gte=3))] = 3,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("out"),
    json: bool = False,
    quiet: bool = False,
) -> int:
    """Generate with the shipped model or a local diffusers pipeline, on ranks started here.

    Parameters
    ----------
    folder
        A folder that save_pretrained wrote, or a shipped model: dit, unet.
    compare
        Also run sequentially, with fewer steps, and by the published schedule, and print a table.
    repeats
        How often each method runs in a comparison.
    out
        Folder for what is generated and result.json.
    json
        Print the result as JSON.
    quiet
        Print nothing but errors.
    """
    plan = _plan(split)
    ranks = _ranks(split.ranks, plan)
    _check_comparison(compare, ranks)
    call = _call(subject)
    threads = machine.threads or (1 if ranks > 1 else detect.usable_cores())
    with _output(out) as written, _Screen(quiet=quiet or json) as screen:
        if ranks > 1 and not split.emulate:
            # First, since it works in another process while this one imports torch.
            prepare(PRELOAD, threads=threads)
        fields = {"ranks": ranks, "plan": plan, "repeats": repeats if compare else 0}
        job = _job(folder, call, subject, machine, emulated=split.emulate, **fields)
        load = os.getloadavg()[0]
        outcomes = _run(job, threads, screen)
        result = _result(job, outcomes, threads, load)
        written.files = _write(out, job, outcomes, result)
    if json:
        print(jsonlib.dumps(_finite(result), indent=1))
    elif not quiet:
        from stretto.cli.generate_table import show

        show(result, out, written.files)
    return 0


app.command(
    "stretto.cli.calibrate:calibrate",
    name="calibrate",
    help="Measure where exact steps belong, and write a calibration file.",
)


# ---- what is asked for -----------------------------------------------------------------------


def _plan(split: Split) -> Plan | None:
    """The plan of the options, None where the ranks decide."""
    names = ("step", "cfg", "windows", "depth", "predictor")
    given = [f"--{name}" for name in names if getattr(split, name) is not None]
    if split.plan is not None:
        if given:
            raise ConfigError(f"--plan {split.plan} already says {', '.join(given)}: give one")
        return read_plan(split.plan)
    if split.predictor is not None and split.predictor not in PREDICTORS:
        raise PlanMismatch(_unknown("predictor", split.predictor, PREDICTORS))
    windows = _windows(split.windows, split.depth)
    if split.step is None and split.cfg is None:
        if given:
            raise PlanMismatch(f"{', '.join(given)} without --step: give the step ranks it is for")
        return None
    predictor = split.predictor or "damped"
    step = Steps(degree=split.step or 1, windows=windows, predictor=predictor)
    return Plan(step=step, cfg=Guidance(degree=split.cfg or 1))


def _windows(text: str | None, depth: int | None) -> Windows:
    if text is None or text == "tail":
        return Tail(depth=depth)
    if text in SCHEDULES:
        if depth is not None:
            raise PlanMismatch(
                f"--depth {depth} with --windows {text}: its depth follows from its own rule; "
                "--depth is for tail and calibration files"
            )
        return SCHEDULES[text]()
    if Path(text).is_file():
        return Calibrated(file=str(Path(text).resolve()), depth=depth)
    raise PlanMismatch(f"{_unknown('schedule', text, tuple(SCHEDULES))}; and no file has that name")


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what} {name!r} is unknown: there are {', '.join(known)}{hint}"


def _ranks(ranks: int | None, plan: Plan | None) -> int:
    if plan is None:
        return ranks or 1
    if ranks is not None and ranks != plan.world_size:
        step, cfg = plan.step.degree, plan.cfg.degree
        raise PlanMismatch(
            f"step {step} x cfg {cfg} = {plan.world_size} ranks, but --ranks is {ranks}\n"
            "  why: every rank has one place on each axis\n"
            f"  to fix: --ranks {plan.world_size}, or degrees whose product is {ranks}"
        )
    return plan.world_size


def _check_comparison(compare: bool, ranks: int) -> None:
    if compare and ranks < 2:
        raise PlanMismatch(
            f"--compare on {ranks} rank: there is nothing to set beside the sequential run\n"
            "  to fix: --ranks 2 or more (with --emulate they need no cores)"
        )


def _call(subject: Subject) -> dict[str, Any]:
    """Arguments of the pipeline call."""
    call: dict[str, Any] = {}
    for text in subject.arguments:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set {text!r}: give name=value, as in --set height=256")
        if name in ("output_type", "generator", "num_inference_steps", "return_dict"):
            raise ConfigError(f"--set {name}: stretto sets it; see --seed, --steps and --out")
        call[name] = _value(value)
    if subject.guidance_scale is not None:
        call["guidance_scale"] = subject.guidance_scale
    if subject.prompt is not None:
        call["prompt"] = subject.prompt
    if subject.classes is not None:
        try:
            call["class_labels"] = [int(item) for item in subject.classes.split(",")]
        except ValueError:
            raise ConfigError(f"--classes {subject.classes!r}: give integers, as 0,3,9") from None
    return call


def _value(text: str) -> Any:
    try:
        return jsonlib.loads(text)
    except ValueError:
        return text


def _job(
    folder: str, call: dict[str, Any], subject: Subject, machine: Machine, **fields: Any
) -> Job:
    """The job, its pipeline looked at but not loaded."""
    from stretto.diffusion.folder import check_torchvision, describe
    from stretto.diffusion.generate import Job

    check_torchvision()
    if describe(folder, subject.denoiser).is_shipped:
        call.setdefault("class_labels", list(DEFAULT_CLASSES))
    return Job(
        source=folder,
        call=call,
        steps=subject.steps,
        seed=subject.seed,
        denoiser=subject.denoiser,
        dtype=machine.dtype,
        device=machine.device,
        timeout_s=machine.timeout,
        **fields,
    )


# ---- running ---------------------------------------------------------------------------------


def _run(job: Job, threads: int, screen: _Screen) -> list[Outcome]:
    from stretto.diffusion.generate import generate as entry

    return launch(
        entry,
        job,
        ranks=1 if job.emulated else job.ranks,
        timeout_s=job.timeout_s,
        threads=threads,
        preload=PRELOAD,
        on_note=screen.note,
    )


class _Screen:
    """The progress of rank 0 as a bar, where somebody can see it."""

    def __init__(self, *, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[far]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, far="")

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def note(self, rank: int, note: dict[str, Any]) -> None:
        if rank:
            return
        done, total = note.get("done"), note.get("total")
        far = f"{done}/{total} steps" if total else ""
        self._bar.update(
            self._task, description=note["stage"], completed=done or 0, total=total, far=far
        )


# ---- the result ------------------------------------------------------------------------------


@dataclass
class _Written:
    files: tuple[str, ...] = ()


@contextlib.contextmanager
def _output(out: Path) -> Iterator[_Written]:
    """A folder known to be writable, gone again if it was made here and nothing came into it."""
    from stretto.diffusion.output import check_writable

    made = check_writable(out)
    try:
        yield _Written()
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _write(out: Path, job: Job, outcomes: list[Outcome], result: dict[str, Any]) -> tuple[str, ...]:
    """Everything at once; the names of the files."""
    from stretto.diffusion.output import staged, write_comparison, write_media, write_result

    media = {run.who: run.media for run in outcomes[0].runs if run.media is not None}
    rows = {row["who"]: row for row in result["rows"]}
    with staged(out) as aside:
        names = write_media(aside, media["ours"])
        if job.repeats:
            sheet = [(_caption(rows[who]), items) for who, items in media.items()]
            names += write_comparison(aside, sheet)
        result["files"] = [*names, "result.json"]
        write_result(aside / "result.json", result)
    return tuple(result["files"])


def _caption(row: dict[str, Any]) -> str:
    lines = [row["who"], f"depth {row['depth']:.3g}"]
    if row.get("identical"):
        lines.append("reference" if row["who"] == "sequential" else "same bits")
    elif "psnr_db" in row:
        lines.append(f"{row['psnr_db']:.1f} dB")
    if "speedup" in row:
        lines[1] += f", {row['speedup']:.2f}x"
    return "\n".join(lines)


def _result(job: Job, outcomes: list[Outcome], threads: int, load: float) -> dict[str, Any]:
    """The document `result/1`."""
    from stretto.diffusion.compare import distance, rows
    from stretto.diffusion.folder import describe

    first = outcomes[0]
    table = rows(outcomes, timed=not job.emulated)
    ours = next(row for row in table if row["who"] == "ours")
    kept = ("speedup", "ceiling", "efficiency", "depth", "psnr_db", "identical")
    summary = {key: ours[key] for key in kept if key in ours}
    if job.repeats:
        floor = distance(first.floor, first.runs[0].media)
        summary["noise_floor_db"] = floor.get("psnr_db")
        summary["noise_floor_identical"] = floor.get("identical")
        summary["evaluation_cost"] = {f"step{s} x cfg{c}": v for (s, c), v in first.costs.items()}
    return {
        "stretto": "result/1",
        "case": f"generate/{describe(job.source, job.denoiser).name}",
        "basis": "measured",
        "device": _device(job, first, threads),
        "command": shlex.join(["stretto", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": _versions(),
        "cores": detect.usable_cores(),
        "load": {"before": load, "after": os.getloadavg()[0]},
        "plan": repr(first.plan),
        "emulated": job.emulated,
        "call": {**job.call, "steps": job.steps, "seed": job.seed, "dtype": job.dtype},
        "repeats": job.repeats or 1,
        "rows": table,
        "summary": summary,
    }


def _device(job: Job, outcome: Outcome, threads: int) -> str:
    if outcome.device != "cpu":
        return f"{job.ranks} ranks on {outcome.device}"
    own = detect.cpu()
    kind = "virtual ranks" if job.emulated else "ranks" if job.ranks > 1 else "rank"
    return f"{job.ranks} CPU {kind} of {threads} thread(s), {own.name}, {own.count} cores"


def _commit() -> str | None:
    """The commit of the tree this package is run from, None for an installed one."""
    here = Path(stretto.__file__).parent
    asked = ["git", "-C", str(here), "log", "-1", "--format=%h", "--", "."]
    with contextlib.suppress(OSError):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def _versions() -> dict[str, str]:
    found = {"stretto": stretto.__version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _finite(result: dict[str, Any]) -> Any:
    from stretto.diffusion.output import finite

    return finite(result)
