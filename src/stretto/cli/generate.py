"""`stretto generate`: start ranks, run one plan or compare several, write what comes back.

What can be checked without loading a model is checked first; the ranks' server warms up meanwhile.
Nothing here imports torch before that server runs.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from stretto.cli.generate_options import (
    MODEL,
    Machine,
    Out,
    Split,
    Subject,
    call_of,
    check_comparison,
    plan_of,
    ranks_of,
    threads_of,
)
from stretto.cli.limits import check_ranks
from stretto.cli.screen import Screen
from stretto.cli.whole import whole
from stretto.mesh.launch import launch, prepare

if TYPE_CHECKING:
    from stretto.diffusion.job import Job

app = App(name="generate", help="Generate pictures, video or sound on several ranks.")

#: Imported by the ranks' server: what every job needs, besides torch.
PRELOAD = ("stretto.diffusion.compare", "stretto.diffusion.shipped.load")
#: Pictures of the shipped models where no classes are asked for: about 15 s on one CPU thread.
DEFAULT_CLASSES = tuple(range(8))

_Repeats = Annotated[int | None, Parameter(converter=whole, validator=validators.Number(gte=3))]
_SPLIT, _SUBJECT, _MACHINE = Split(), Subject(), Machine()


@app.default
def generate(
    folder: str = MODEL,
    /,
    *,
    split: Split = _SPLIT,
    subject: Subject = _SUBJECT,
    machine: Machine = _MACHINE,
    compare: bool = False,
    repeats: _Repeats = None,
    out: Out = Path("out"),
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
        How often each method runs in a comparison, 3 at least and by default.
    out
        Folder for what is generated and result.json.
    json
        Print the result as JSON.
    quiet
        Print nothing but errors.
    """
    plan = plan_of(split)
    ranks = ranks_of(split.ranks, plan)
    check_comparison(compare, repeats, ranks)
    call = call_of(subject)
    threads = threads_of(machine.threads, ranks)
    if not split.emulate:
        check_ranks(ranks)
    from stretto.diffusion.output import check_writable

    check_writable(out)
    with Screen(quiet=quiet or json) as screen:
        if ranks > 1 and not split.emulate:
            # First, since it works in another process while this one imports torch.
            prepare(PRELOAD, threads=threads)
        fields = {"ranks": ranks, "plan": plan, "repeats": (repeats or 3) if compare else 0}
        job = _job(folder, call, subject, machine, emulated=split.emulate, **fields)
        result, files = _run(job, threads, screen, out)
    if json:
        from stretto.diffusion.output import finite

        print(jsonlib.dumps(finite(result), indent=1))
    elif not quiet:
        from stretto.cli.generate_table import show

        show(result, out, files)
    return 0


app.command(
    "stretto.cli.calibrate:calibrate",
    name="calibrate",
    help="Measure which windows suit a model, and write a calibration file.",
)


def _job(
    folder: str, call: dict[str, Any], subject: Subject, machine: Machine, **fields: Any
) -> Job:
    """The job, its pipeline looked at but not loaded."""
    from stretto.diffusion.calibration import check_file
    from stretto.diffusion.folder import check_torchvision, describe
    from stretto.diffusion.job import Job
    from stretto.diffusion.worker import check_degree

    check_torchvision()
    if fields["plan"] is not None:
        check_degree(fields["plan"], subject.steps)
        check_file(fields["plan"].step)
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


def _run(
    job: Job, threads: int, screen: Screen, out: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Run the job on its ranks and write what comes back; the result and the files' names."""
    from stretto.cli import generate_result
    from stretto.diffusion.generate import generate as entry
    from stretto.diffusion.provenance import load_now

    load = load_now()
    outcomes = launch(
        entry,
        job,
        ranks=1 if job.emulated else job.ranks,
        timeout_s=job.timeout_s,
        threads=threads,
        preload=PRELOAD,
        on_note=screen.note,
    )
    result = generate_result.document(job, outcomes, threads, load)
    return result, generate_result.write(out, job, outcomes, result)
