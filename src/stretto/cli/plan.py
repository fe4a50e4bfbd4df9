"""`stretto plan`: a ranked table of plans for a job on a cluster, and the best as a plan file."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from stretto import documents
from stretto.cli.whole import AT_LEAST_1
from stretto.cluster.model import Cluster
from stretto.plan.io import write_plan
from stretto.search.attention import TrainRanking, rank_plans, table
from stretto.workload.train import Dtype, Training

app = App(name="plan", help="Find the plan for a job on a cluster: a ranked table and a file.")

_Count = Annotated[int, AT_LEAST_1]
_Some = Annotated[int | None, AT_LEAST_1]


@app.command(name="train")
def plan_train(
    model: str,
    /,
    *,
    cluster: str,
    tokens: _Count = 65536,
    sequences: _Count = 1,
    dtype: Dtype = "bf16",
    window: _Some = None,
    ranks: _Some = None,
    top: _Count = 12,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    workload: Path | None = None,
    json: bool = False,
) -> int:
    """Rank every way to split training sequences over a cluster, fastest first.

    Degrees of Ulysses, teams and rings in one and two levels, StarTrail, what backward keeps, and
    sequences side by side; all are exact. Times are projected from the cluster's rates.

    Parameters
    ----------
    model
        A preset (gpt-tiny to gpt-8b, gpt3-1.3b to gpt3-13b, opt-30b, llama3-8b, dit-xl), a Hugging
        Face config.json, or the folder that holds one.
    cluster
        A cluster file, or the name of a preset such as h100-8x8.
    tokens
        Tokens of one sequence.
    sequences
        Sequences of one step.
    dtype
        Of activations and messages.
    window
        Keys that a token sees, all by default.
    ranks
        Devices to use, the first ones; all by default.
    top
        Rows of the table; the best of each named family follow.
    out
        Where the best plan is written, for `stretto train --plan`.
    workload
        Where the job is written, for `stretto explain --workload`.
    json
        Print one JSON object with every plan.
    """
    for path in (out, workload):
        if path is not None:
            documents.check_writable(path)
    fields = {"sequences": sequences, "dtype": dtype, "window": window}
    job = Training.of(model, tokens, **fields)
    ranking = rank_plans(job, Cluster.read(cluster), ranks=ranks)
    if out is not None:
        write_plan(ranking.best, out)
    if workload is not None:
        job.write(workload)
    if json:
        print(jsonlib.dumps(_as_dict(ranking), indent=1))
        return 0
    print(_heading(ranking))
    print("\n".join(table(ranking, top)))
    print(f"basis: projected from a {ranking.cluster.basis} cluster, {ranking.cluster.name}")
    for path in (out, workload):
        if path is not None:
            print(f"written: {path}")
    return 0


def _heading(ranking: TrainRanking) -> str:
    job, arch = ranking.training, ranking.training.arch
    heads = f"{arch.heads} query and {arch.kv_heads} key heads of {arch.head_dim}"
    return (
        f"{job.model}: {arch.layers} layers, {heads}, {arch.parameters / 1e9:.3g} G parameters; "
        f"{job.sequences} x {job.tokens} tokens in {job.dtype} on {ranking.cluster.size} devices"
    )


def _as_dict(ranking: TrainRanking) -> dict:
    return {
        "workload": ranking.training.model_dump(mode="json"),
        "cluster": ranking.cluster.name,
        "basis": "projected",
        "best": ranking.best.model_dump(mode="json"),
        "plans": [{"name": c.name, **c.estimate.as_dict()} for c in ranking.choices],
        "left_out": [{"plan": str(c.plan), "why": why} for c, why in ranking.dropped],
    }
