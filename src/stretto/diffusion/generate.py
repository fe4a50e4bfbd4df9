"""One generation job on one rank: open the pipeline, run the methods asked for, give results back.

`generate` is the entry that `mesh.launch.launch` runs on every rank. A job has one method (the
plan asked for) or, in a comparison, several that take turns on the same ranks.
"""

from __future__ import annotations

import os

import torch

from stretto.diffusion.compare import compare
from stretto.diffusion.folder import describe, open_pipeline
from stretto.diffusion.job import Job, Outcome
from stretto.diffusion.worker import Worker, guides
from stretto.errors import ConfigError
from stretto.mesh.join import present
from stretto.mesh.launch import Tell
from stretto.plan.model import Plan


def generate(tell: Tell, job: Job) -> Outcome:
    """Run a job on this rank. Every rank calls it with the same job; results differ as `Run` says.

    Raises what the pipeline, the plan or the mesh raises, on the rank where it happens.
    """
    tell("opening the pipeline")
    description = describe(job.source, job.denoiser)
    device = _device(job)
    pipe = open_pipeline(description, dtype=_dtype(job.dtype), device=device)
    plan = job.plan or automatic_plan(job.ranks, guides(pipe, job.call))
    worker = Worker(pipe, job, plan, tell, device)
    if job.repeats:
        return compare(worker)
    run = worker.run("ours", plan, job.steps)
    return Outcome(plan=plan, device=device.type, runs=[run])


def automatic_plan(ranks: int, guided: bool) -> Plan:
    """cfg first, because it is exact, where guidance is on and the ranks are even; rest to step."""
    cfg = 2 if guided and ranks % 2 == 0 else 1
    return Plan(step=ranks // cfg, cfg=cfg)


def _device(job: Job) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", "0")) if job.ranks > 1 and not job.emulated else 0
    device = present(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local % torch.cuda.device_count())
    return device


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"--dtype {name!r} is unknown; known are {', '.join(known)}")
    return known[name]
