"""What `stretto generate` leaves behind: the document result/1, and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stretto.cluster import detect
from stretto.diffusion.compare import distance, rows
from stretto.diffusion.folder import describe
from stretto.diffusion.job import Job, Outcome
from stretto.diffusion.output import staged, write_comparison, write_media, write_result
from stretto.diffusion.provenance import load_now, provenance


def write(out: Path, job: Job, outcomes: list[Outcome], result: dict[str, Any]) -> tuple[str, ...]:
    """Everything at once; the names of the files."""
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


def document(job: Job, outcomes: list[Outcome], threads: int, load: float) -> dict[str, Any]:
    """The document `result/1`."""
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
        **provenance(),
        "load": {"before": load, "after": load_now()},
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
