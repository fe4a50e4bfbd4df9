"""One process killed in the middle of a run: whether the others name it, and how soon they end.

python benchmarks/kill_gpus.py --out kill.json [--ranks N] [--carriers nccl symmetric] [--dry]

The parent starts one process per GPU for every carrier and kind of work, as torchrun would set
their environment, and keeps the store that torchrun's agent would keep. `attention` runs ring
attention, forward and backward, over and over; `train` steps a small GPT with sharded weights;
`weights` the same, and the others wait inside torch's own gather of weights, which the mesh does
not see. The last rank kills itself with SIGKILL in the middle, where others wait for it. Each
survivor writes down what error it got and when. ok: every survivor ended by itself before the
deadline, with an error that names the killed rank. `--dry` runs on the CPU over gloo.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job
import result
import torch
import torch.distributed as dist

from stretto.mesh.join import init_mesh
from stretto.mesh.mesh import Mesh
from stretto.ops.attention.dist import attention
from stretto.plan.context import Context
from stretto.plan.model import Plan
from stretto.train.job import Job, attention_bound, build
from stretto.train.presets import task_of
from stretto.train.recipe import Recipe

Work = Callable[[], Any]
WORKS = ("attention", "train", "weights")
#: A survivor must end before this many seconds have passed since the death.
TIMEOUT_S = 30.0
#: Rounds before the death: kernels are loaded and communicators made.
ROUNDS = 3
#: Seconds beyond the deadline, counted from the start, after which a rank shows where it is.
SHOW_AFTER_S = 25.0
#: What the parent waits for a case from its start: imports, kernels, the deadline.
LIMIT_S = 75.0


# ---- the parent ----------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> int:
    device = torch.device("cpu" if options.dry else "cuda:0")
    ranks = options.ranks or (2 if options.dry else torch.cuda.device_count())
    words = job.device_words(device, ranks)
    found = result.begin("mesh/kill", words, options.commit, ranks=ranks, timeout_s=TIMEOUT_S)
    found["skipped"], began = [], time.time()
    for carrier, work in itertools.product(options.carriers, options.works):
        if time.time() - began > options.budget_s:
            found["skipped"].append({"who": f"kill/{carrier}/{work}", "why": "past the budget"})
        else:
            found["rows"].append(case(ranks, carrier, work, options.dry))
            print(line(found["rows"][-1]), flush=True)
        found["summary"] = summary(found["rows"])
        result.write(options.out, found)
    print(json.dumps(found["summary"], indent=1))
    return 0 if found["summary"]["ok"] else 1


def case(ranks: int, carrier: str, work: str, dry: bool) -> dict[str, Any]:
    """Start the ranks, follow them to their ends, and judge what the survivors wrote down."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--out", folder, "--carriers", carrier]
        command += ["--works", work, *(["--dry"] if dry else [])]
        base = environment(ranks, store.port, dry)
        processes = [
            subprocess.Popen(command, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        ends = followed(processes)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        told = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return judged(carrier, work, told, ends)


def environment(ranks: int, port: int, dry: bool) -> dict[str, str]:
    """What torchrun gives its ranks; the store is the parent's, so that it outlives every rank."""
    source = str(Path(__file__).resolve().parents[1] / "src")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        **({"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"} if dry else {}),
    }


def followed(processes: list[subprocess.Popen]) -> list[tuple[int | None, float]]:
    """Exit code and time of end of each process, None for one that had to be ended."""
    ends: dict[int, tuple[int | None, float]] = {}
    until = time.time() + LIMIT_S
    while len(ends) < len(processes) and time.time() < until:
        for rank, process in enumerate(processes):
            # The victim stays a zombie for as long as the others may look: nobody reaps it here
            # before they are done.
            if rank not in ends and rank != len(processes) - 1 and process.poll() is not None:
                ends[rank] = (process.returncode, time.time())
        if len(ends) == len(processes) - 1:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        late = rank not in ends and rank != len(processes) - 1
        process.kill()
        process.wait()
        ends.setdefault(rank, (None if late else process.returncode, time.time()))
    return [ends[rank] for rank in range(len(processes))]


def judged(
    carrier: str, work: str, told: list[dict], ends: list[tuple[int | None, float]]
) -> dict[str, Any]:
    """A row: seconds from the death to each survivor's error and end, and whether all is well."""
    victim = len(told) - 1
    died = told[victim].get("died")
    survivors = []
    for rank, note in enumerate(told[:victim]):
        code, end = ends[rank]
        error = note.get("error", "")
        survivors.append(
            {
                "rank": rank,
                "exit_code": code,
                "error": error,
                "named": f"rank {victim}" in error,
                "error_after_s": note["time"] - died if died and error else None,
                "end_after_s": end - died if died and code is not None else None,
            }
        )
    in_time = [s["end_after_s"] is not None and s["end_after_s"] < TIMEOUT_S for s in survivors]
    ended = [s["end_after_s"] for s in survivors if s["end_after_s"] is not None]
    return {
        "who": f"kill/{carrier}/{work}",
        "carrier": carrier,
        "work": work,
        "ms": [1e3 * seconds for seconds in ended],
        "killed": victim,
        "survivors": survivors,
        "all_named": all(s["named"] for s in survivors),
        "all_in_time": all(in_time),
        "by_signal": [s["rank"] for s in survivors if (s["exit_code"] or 0) < 0],
        "ok": bool(died) and all(s["named"] for s in survivors) and all(in_time),
    }


def summary(rows: list[dict]) -> dict[str, Any]:
    return {
        "ok": all(row["ok"] for row in rows),
        "slowest_end_s": {row["who"]: max(row["ms"], default=float("nan")) / 1e3 for row in rows},
        "wrong": [row["who"] for row in rows if not row["ok"]],
        "ended_by_signal": {row["who"]: row["by_signal"] for row in rows if row["by_signal"]},
    }


def line(row: dict) -> str:
    slow = max(row["ms"], default=float("nan")) / 1e3
    words = f"{row['who']:28} {'ok' if row['ok'] else 'WRONG'}: survivors ended after {slow:.1f} s"
    errors = "; ".join(f"{s['rank']}: {s['error'][:160] or 'no error'}" for s in row["survivors"])
    return f"{words}, named: {row['all_named']}\n    {errors}"


# ---- a rank --------------------------------------------------------------------------------------


def rank_main(options: argparse.Namespace) -> int:
    """Work until the victim dies; write down the error, and end with code 3."""
    torch.set_num_threads(1)
    # A survivor that does not end says where it is.
    faulthandler.dump_traceback_later(TIMEOUT_S + SHOW_AFTER_S)
    (carrier,), (work,) = options.carriers, options.works
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, context = job.local_device(options.dry), Context(ring=ranks)
    plan = Plan(kind="train", cp=context)
    carried = "auto" if carrier == "gloo" else carrier
    make = {"attention": attend, "train": train, "weights": train}[work]
    if carrier == "symmetric":
        # A kernel that loads behind one that waits on the device would wait for ever.
        warm = init_mesh(plan, device=device, timeout_s=TIMEOUT_S, carrier="nccl")
        make(warm, plan, options.dry)[0]()
        result.synchronise(device)
        warm.close()
    mesh = init_mesh(plan, device=device, timeout_s=TIMEOUT_S, carrier=carried)
    file = options.out / f"{rank}.json"
    try:
        with mesh.ending_peers(work):
            step, begun = make(mesh, plan, options.dry)
            last = begun if work == "weights" else mesh.check
            repeat(step, last if rank == ranks - 1 else None, mesh, file)
    except Exception as error:  # noqa: BLE001 - whatever a survivor gets is what is measured
        told = {"time": time.time(), "error": f"{type(error).__name__}: {error}"}
        file.write_text(json.dumps(told))
    # Communicators of a lost mesh cannot be closed in order.
    os._exit(3)


def repeat(step: Work, last: Work | None, mesh: Mesh, file: Path) -> None:
    """Rounds without end; the one that has a `last` thing to do leaves after it, in the middle."""
    number = 0
    while True:
        mesh.record(f"round {number}")
        if number == ROUNDS:
            mesh.barrier()
        if last and number == ROUNDS:
            last()
            # By now the others wait for this rank's next message.
            time.sleep(1.0)
            file.write_text(json.dumps({"died": time.time()}))
            os.kill(os.getpid(), signal.SIGKILL)
        step()
        result.synchronise(mesh.device)
        mesh.check()
        number += 1


def attend(mesh: Mesh, plan: Plan, dry: bool) -> tuple[Work, Work]:
    """Ring attention over and over on the same rows; it begins with nothing."""
    ranks, rows = mesh.world_size, 16 if dry else 4096
    dtype, heads, dim = (torch.float32, 2, 16) if dry else (torch.bfloat16, 16, 128)
    drawn = (torch.randn(1, heads, rows, dim, device=mesh.device, dtype=dtype) for _ in range(4))
    *inputs, dout = drawn
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> None:
        more = {"plan": plan.cp, "causal": True, "tokens": ranks * rows}
        out = attention(*leaves, mesh=mesh, **more)
        torch.autograd.grad(out, leaves, dout)

    return step, mesh.check


def train(mesh: Mesh, plan: Plan, dry: bool) -> tuple[Work, Work]:
    """A GPT whose weights are sharded over the same ranks as its sequence: a step, its beginning.

    After the beginning the others gather weights.
    """
    model, tokens = ("gpt-tiny", 64) if dry else ("gpt-medium", 8192)
    dtype = "float32" if dry else "bfloat16"
    recipe = Recipe(model=model, tokens=tokens * mesh.world_size, sequences=1, dtype=dtype)
    task = task_of(recipe)
    module = task.model()
    bound = attention_bound(module, plan, mesh)
    bound.__enter__()
    trainer = build(task, module, Job(recipe=recipe, plan=plan), mesh)
    return trainer.step, trainer.draw


def parse() -> argparse.Namespace:
    made = job.parser(__doc__, budget_s=240)
    made.add_argument("--ranks", type=int, help="by default one per GPU")
    made.add_argument("--carriers", nargs="+", default=["nccl", "symmetric"])
    made.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    options = made.parse_args()
    if options.dry and "RANK" not in os.environ:
        options.carriers = ["gloo"]
        # Over gloo a gather of weights fails at once, and by itself does not say who is gone.
        options.works = [work for work in options.works if work != "weights"]
    return options


if __name__ == "__main__":
    asked = parse()
    sys.exit(rank_main(asked) if "RANK" in os.environ else main(asked))
