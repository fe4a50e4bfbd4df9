"""Messages between ranks, by carrier: right to the bit, time of a hop by size, and how waits end.

python benchmarks/mesh_exchange.py --ranks 4 --mps --carriers symmetric gloo --out x.json
python benchmarks/mesh_exchange.py --ranks 2 --carriers nccl symmetric --out x.json [--dry]

The parent starts one process per rank for every carrier and case; ranks beyond the number of GPUs
share them, with `--mps` at the same time, without it in turns (right, but not worth timing). What
arrives is compared with what its sender is known to have written, and the digests of all carriers
with one another. `--dry` walks the same code on the CPU over gloo with small messages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import job
import mps
import result
import torch

from stretto.errors import MeshTimeout, RankLost
from stretto.mesh.join import init_mesh
from stretto.mesh.mesh import Mesh

AXIS = "ring_in"
SIZES = tuple(1024 * 4**power for power in range(10))
DRY_SIZES = (1024, 65536)
#: Sizes in bytes of letters that are checked; the largest are many pieces of a slot.
LETTERS = (0, 1, 7, 4096, 1_000_003, 9_000_001, 40_000_000)
DRY_LETTERS = (0, 1, 7, 4096)
CASES = ("check", "time", "abort", "deadline")
TIMEOUT_S = 60.0
#: The limit that is waited out in the case `deadline`.
DEADLINE_S = 4.0


# ---- the parent --------------------------------------------------------------------------------


@dataclass
class Told:
    """What the ranks of one case wrote, by rank."""

    carrier: str
    case: str
    ranks: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def main() -> int:
    options = arguments()
    if "RANK" in os.environ:
        return rank_main(options)
    found = result.begin("mesh/exchange", device_words(options), options.commit)
    found["ranks"] = options.ranks
    told = []
    with mps.daemon() if options.mps else nullcontext({}) as environment:
        for carrier in options.carriers:
            for case in options.cases:
                told.append(start(options, carrier, case, environment))
                found["rows"] += rows(told[-1])
                found["summary"] = summary(told)
                result.write(options.out, found)
                state = told[-1].error[-1500:] or "done"
                print(f"{carrier:10} {case:9} {state}", flush=True)
    print(json.dumps(found["summary"], indent=1))
    return 0 if found["summary"]["ok"] else 1


def device_words(options: argparse.Namespace) -> str:
    """What the result calls the machine."""
    if options.dry or options.ranks <= torch.cuda.device_count():
        return job.device_words(torch.device("cpu" if options.dry else "cuda:0"), options.ranks)
    how = "MPS slices" if options.mps else "processes in turns"
    return f"{options.ranks} {how} of one {torch.cuda.get_device_name(0)}"


def start(options: argparse.Namespace, carrier: str, case: str, environment: dict) -> Told:
    """One process per rank, joined over a port of this machine."""
    told = Told(carrier, case)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--carriers", carrier, "--cases", case]
        words += ["--out", folder, *(["--dry"] if options.dry else [])]
        source = str(Path(__file__).resolve().parents[1] / "src")
        base = {**job.ONE_HOST, **os.environ, **environment, "OMP_NUM_THREADS": "1"}
        base["PYTHONPATH"] = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        base |= {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks)}
        if options.mps:
            base |= mps.slice_environment(options.ranks)
        processes = [
            subprocess.Popen(words, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(options.ranks)
        ]
        deadline = time.monotonic() + options.limit_s
        try:
            for rank, process in enumerate(processes):
                code = process.wait(max(1.0, deadline - time.monotonic()))
                if code:
                    told.error += f"rank {rank} ended with exit code {code}; "
        except subprocess.TimeoutExpired:
            told.error += f"not done within {options.limit_s:g} s; "
        finally:
            for process in processes:
                process.kill()
                process.wait()
        files = [Path(folder) / f"{rank}.json" for rank in range(options.ranks)]
        told.ranks = [json.loads(file.read_text()) for file in files if file.exists()]
    return told


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(told: Told) -> list[dict[str, Any]]:
    """A row per measured size: the slowest rank's medians."""
    found: dict[tuple[str, int], list[float]] = {}
    for rank in told.ranks:
        for verb, num_bytes, seconds in rank.get("times", []):
            found.setdefault((verb, num_bytes), []).append(seconds)
    return [
        {
            "who": told.carrier,
            "verb": verb,
            "bytes": num_bytes,
            "ms": 1e3 * max(values),
            "rate": num_bytes / max(values),
        }
        for (verb, num_bytes), values in found.items()
    ]


def summary(told: list[Told]) -> dict[str, Any]:
    """Whether all is right, the digests, and the seconds in which waits ended."""
    digests = {t.carrier: [r["digest"] for r in t.ranks] for t in told if t.case == "check"}
    ended = {
        f"{t.carrier} {t.case}": max(r["seconds"] for r in t.ranks)
        for t in told
        if t.case in ("abort", "deadline") and t.ranks
    }
    named = [r["named"] for t in told if t.case in ("abort", "deadline") for r in t.ranks]
    errors = {f"{t.carrier} {t.case}": t.error for t in told if t.error}
    equal = len({json.dumps(d) for d in digests.values()}) <= 1
    return {
        "ok": equal and not errors and all(named),
        "digests_equal": equal,
        "waits_ended_s": ended,
        "culprit_named": all(named),
        "errors": errors,
    }


# ---- a rank --------------------------------------------------------------------------------------


def rank_main(options: argparse.Namespace) -> int:
    (carrier,), (case,) = options.carriers, options.cases
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = torch.device("cpu")
    if not options.dry:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    mesh = init_mesh(job.Axes({AXIS: ranks}), device=device, timeout_s=TIMEOUT_S, carrier=carrier)
    told = {"check": check, "time": measure, "abort": aborted, "deadline": late}[case](
        mesh, dry=options.dry
    )
    (options.out / f"{rank}.json").write_text(json.dumps(told))
    mesh.close()
    # Rank 0 holds the store, so it leaves last.
    while rank == 0 and len(list(options.out.glob("*.json"))) < ranks:
        time.sleep(0.01)
    # A mesh that was ended has communicators that cannot be closed in order.
    os._exit(0)


def letter(sender: int, reader: int, size: int, number: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(10_000 * number + 100 * sender + reader)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=made)


def check(mesh: Mesh, *, dry: bool) -> dict[str, Any]:
    """Uneven messages on three channels, several under way while the device computes."""
    chance, sizes = random.Random(0), DRY_LETTERS if dry else LETTERS
    ranks, here, digest = mesh.size(AXIS), mesh.rank(AXIS), hashlib.sha256()
    work = torch.randn(256, 256, device=mesh.device)
    under_way = []
    for number in range(40):
        lengths = {
            (s, r): chance.choice(sizes) if chance.random() < 0.7 else 0
            for s in range(ranks)
            for r in range(ranks)
        }
        sends = {r: letter(here, r, lengths[here, r], number).to(mesh.device) for r in range(ranks)}
        receives = {
            s: torch.full((lengths[s, here],), 255, dtype=torch.uint8, device=mesh.device)
            for s in range(ranks)
        }
        channel = number % 3
        under_way.append((number, mesh.exchange(sends, receives, AXIS, "check", channel=channel)))
        work = work @ work / work.norm()
        if len(under_way) > 5:
            take(*under_way.pop(chance.randrange(3)), here, digest)
    for number, pending in under_way:
        take(number, pending, here, digest)
    return {"digest": digest.hexdigest(), "finite": bool(work.isfinite().all())}


def take(number: int, pending: Any, here: int, digest: Any) -> None:
    for sender, tensor in sorted(pending.wait().items()):
        arrived = tensor.cpu()
        wanted = letter(sender, here, arrived.numel(), number)
        assert torch.equal(arrived, wanted), f"exchange {number}: {sender} to {here} differs"
        digest.update(arrived.numpy().tobytes())


def measure(mesh: Mesh, *, dry: bool) -> dict[str, Any]:
    """Seconds of a ring hop and of an all-to-all of as many bytes, own part included, in chains."""
    ranks, here, times = mesh.size(AXIS), mesh.rank(AXIS), []
    for num_bytes in DRY_SIZES if dry else SIZES:
        hops = 4 if dry else max(4, min(50, 2**28 // num_bytes))
        a, b = (torch.zeros(num_bytes, dtype=torch.uint8, device=mesh.device) for _ in range(2))
        down, up = (here - 1) % ranks, (here + 1) % ranks

        def hop(a=a, b=b, down=down, up=up) -> None:
            mesh.exchange({down: a}, {up: b}, AXIS, "time").wait()
            mesh.exchange({down: b}, {up: a}, AXIS, "time").wait()

        parts, into = (x.split(num_bytes // ranks)[:ranks] for x in (a, b))

        def spread(parts=parts, into=into) -> None:
            mesh.exchange(
                dict(enumerate(parts)), dict(enumerate(into)), AXIS, "time", channel=1
            ).wait()

        times.append(("shift", num_bytes, repeated(mesh, hop, hops) / 2))
        times.append(("all_to_all", num_bytes, repeated(mesh, spread, hops)))
    return {"times": times}


def repeated(mesh: Mesh, work: Any, count: int) -> float:
    """Median over five chains of the seconds per piece of work."""
    work()
    samples = []
    for _ in range(5):
        result.synchronise(mesh.device)
        mesh.barrier()
        begun = time.perf_counter()
        for _ in range(count):
            work()
        result.synchronise(mesh.device)
        samples.append((time.perf_counter() - begun) / count)
    return statistics.median(samples)


def meet(mesh: Mesh) -> None:
    """A hop round the ring, so that what follows does not wait for connections."""
    ranks, here = mesh.size(AXIS), mesh.rank(AXIS)
    a, b = torch.zeros(16, device=mesh.device), torch.zeros(16, device=mesh.device)
    mesh.exchange({(here - 1) % ranks: a}, {(here + 1) % ranks: b}, AXIS, "column").wait()
    result.synchronise(mesh.device)
    mesh.barrier()


def never(mesh: Mesh) -> None:
    """Wait for a message from the next rank up, which sends none."""
    up = (mesh.rank(AXIS) + 1) % mesh.size(AXIS)
    into = {up: torch.zeros(1024, device=mesh.device)}
    mesh.exchange({}, into, AXIS, "column").wait()
    result.synchronise(mesh.device)


def aborted(mesh: Mesh, *, dry: bool) -> dict[str, Any]:
    """The last rank raises while all others wait: seconds until they know, and whether whom."""
    culprit = mesh.world_size - 1
    meet(mesh)
    begun = time.perf_counter()
    try:
        with mesh.ending_peers("a layer"):
            if mesh.world_rank == culprit:
                raise ValueError("bad shard")
            never(mesh)
    except (ValueError, RankLost) as error:
        named = "bad shard" in str(error)
        return {"seconds": time.perf_counter() - begun, "named": named, "error": str(error)}
    raise AssertionError("a wait for nothing ended well")


def late(mesh: Mesh, *, dry: bool) -> dict[str, Any]:
    """The last rank is busy elsewhere until the others have given up at their deadline."""
    culprit = mesh.world_size - 1
    meet(mesh)
    # Only now: to start and to connect may take longer.
    mesh.allow(DEADLINE_S)
    begun = time.perf_counter()
    mesh.record("busy elsewhere")
    try:
        with mesh.ending_peers("a layer"):
            if mesh.world_rank == culprit:
                time.sleep(2 * mesh.timeout_s)
                mesh.barrier()
            never(mesh)
    except MeshTimeout as error:
        named = f"rank {culprit}" in str(error) or mesh.world_rank == culprit
        return {"seconds": time.perf_counter() - begun, "named": named, "error": str(error)}
    raise AssertionError("a wait for nothing ended well")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--carriers", nargs="+", default=["gloo"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--mps", action="store_true", help="share one GPU at the same time")
    parser.add_argument("--dry", action="store_true", help="small messages on the CPU")
    parser.add_argument("--limit-s", type=float, default=240.0, help="for one carrier and case")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
