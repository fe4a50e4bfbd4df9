"""What `stretto train` leaves behind beside metrics and checkpoints: result/1, the loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.cluster import detect
from stretto.diffusion.output import staged, write_result
from stretto.diffusion.provenance import load_now, provenance
from stretto.train import metrics
from stretto.train.job import Job, Outcome

if TYPE_CHECKING:
    from stretto.train.compare import Comparison


def document(
    job: Job, outcomes: list[Outcome], found: Comparison | None, threads: int, load: float
) -> dict[str, Any]:
    """The document `result/1`."""
    first, ranks = outcomes[0], job.plan.world_size
    ours = row(f"{ranks} ranks" if ranks > 1 else "1 rank", first, ranks)
    rows = [ours]
    summary = {key: ours[key] for key in ("loss", "held_out_loss", "tokens_per_second", "mfu")}
    if found is not None:
        from stretto.train.compare import figures

        rows = [row("1 rank", found.alone, 1), ours]
        rows += [row("independent runs", outcome, 1) for outcome in found.apart]
        summary |= figures(found, ranks)
    return {
        "stretto": "result/1",
        "case": f"train/{Path(job.recipe.model).name}",
        "basis": "measured",
        "device": _device(first, ranks, threads),
        **provenance(),
        "load": {"before": load, "after": load_now()},
        "plan": repr(job.plan),
        "recipe": job.recipe.as_dict(),
        "parameters": first.parameters,
        "resumed": first.note,
        "checkpoint": first.saved,
        "rows": rows,
        "summary": summary,
    }


def row(who: str, outcome: Outcome, ranks: int) -> dict[str, Any]:
    """One run: its last losses, its speed. MFU is against matrix products measured here."""
    return {
        "who": who,
        "ranks": ranks,
        "steps": len(outcome.steps),
        "loss": outcome.steps[-1].loss if outcome.steps else None,
        "held_out_loss": outcome.validations[-1].loss if outcome.validations else None,
        "seconds": [step.seconds for step in outcome.steps],
        "median_s": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu(ranks),
        "peak_flops": outcome.peak,
    }


def write(out: Path, result: dict[str, Any]) -> list[str]:
    """The curve and the result, at once; remarks on what could not be written."""
    from stretto.cli.train_curve import draw

    with staged(out) as aside:
        files, remarks = draw(aside, metrics.read(out / metrics.FILE), result["case"])
        result["files"] = [metrics.FILE, *files, "result.json"]
        write_result(aside / "result.json", result)
    return remarks


def _device(outcome: Outcome, ranks: int, threads: int) -> str:
    if outcome.device != "cpu":
        return f"{ranks} rank(s) on {outcome.device}"
    own = detect.cpu()
    return f"{ranks} CPU rank(s) of {threads} thread(s), {own.name}, {own.count} cores"
