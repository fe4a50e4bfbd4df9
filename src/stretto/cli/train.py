"""`stretto train`: start ranks, train a preset or a transformers configuration, write what it did.

What can be checked without loading a model is checked first; the ranks' server warms up meanwhile.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from stretto.cli.limits import check_ranks, check_threads
from stretto.cli.screen import Screen
from stretto.cli.train_options import (
    Down,
    Log,
    Machine,
    Split,
    Work,
    plan_of,
    recipe_of,
)
from stretto.errors import ConfigError
from stretto.mesh.launch import prepare

if TYPE_CHECKING:
    from stretto.train.job import Job

app = App(name="train", help="Train a model on long sequences over several ranks.")

#: As in stretto.train.compare, which imports torch.
PRELOAD = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "stretto.parallel.api",
    "stretto.train.compare",
)
_SPLIT, _WORK, _DOWN, _MACHINE, _LOG = Split(), Work(), Down(), Machine(), Log()


@app.default
def train(
    model: str = "gpt-tiny",
    /,
    *,
    split: Split = _SPLIT,
    work: Work = _WORK,
    down: Down = _DOWN,
    machine: Machine = _MACHINE,
    log: Log = _LOG,
    compare: bool = False,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("out/train"),
    json: bool = False,
    quiet: bool = False,
) -> int:
    """Train on ranks started here, on real text, with checkpoints that resume exactly.

    Parameters
    ----------
    model
        A preset (gpt-tiny, gpt-small, gpt-medium, gpt-large, gpt-8b, dit-tiny, dit-small), or a
        folder with a transformers config.json.
    compare
        Also train on one rank on the same samples, and state differences, speed-up and ceiling.
    out
        Folder for metrics.jsonl, checkpoints, the loss curve and result.json.
    json
        Print the result as JSON.
    quiet
        Print nothing but errors.
    """
    check_threads(machine.threads)
    if split.ranks != 1 or split.plan or split.cp:
        # First, since it works in another process while this one imports torch.
        prepare(PRELOAD, threads=machine.threads)
    recipe = recipe_of(model, work, down, machine.dtype)
    plan = plan_of(split, recipe)
    check_ranks(plan.world_size)
    _check(plan.world_size, compare, log.resume)
    from stretto.train.job import Job, check_unused

    if not log.resume:
        check_unused(out)
    job = Job(
        recipe=recipe,
        plan=plan,
        out=str(out),
        validate=log.validate_every,
        save=log.save_every,
        resume=log.resume,
        device=machine.device,
        timeout_s=machine.timeout,
    )
    from stretto.diffusion.output import check_writable

    check_writable(out)
    with Screen(quiet=quiet or json) as screen:
        result, notes = _run(job, machine.threads, compare, screen)
    _show(result, notes, out, json, quiet)
    return 0


def _check(ranks: int, compare: bool, resume: bool) -> None:
    """Raise ConfigError for what would waste a run."""
    if compare and ranks < 2:
        raise ConfigError(
            f"--compare on {ranks} rank: there is nothing to set beside one rank\n"
            "  to fix: --ranks 2 or more"
        )
    if compare and resume:
        raise ConfigError("--compare with --resume: one rank would have to resume too; give one")


def _run(job: Job, threads: int, compare: bool, screen: Screen) -> tuple[dict[str, Any], list[str]]:
    """Train, and write what comes back; the result and remarks for who asked."""
    from stretto.cli import train_result
    from stretto.diffusion.provenance import load_now
    from stretto.train import compare as comparing

    load, found = load_now(), None
    if compare:
        found, outcomes = comparing.compare(job, threads=threads, on_note=screen.note)
    else:
        outcomes = comparing.start(job, threads=threads, on_note=screen.note)
    result = train_result.document(job, outcomes, found, threads, load)
    if not outcomes[0].steps:
        return result | {"files": []}, [
            "no step was left to do: curve and result stay as they were"
        ]
    notes = train_result.write(Path(job.out or "."), result)
    if job.resume and not outcomes[0].note:
        notes.append(f"no checkpoint in {job.out} to resume from: this run began at step 1")
    return result, notes


def _show(result: dict[str, Any], notes: list[str], out: Path, json: bool, quiet: bool) -> None:
    if json:
        from stretto.diffusion.output import finite

        print(jsonlib.dumps(finite(result), indent=1))
    elif not quiet:
        from stretto.cli.train_table import show

        show(result, notes, out)
