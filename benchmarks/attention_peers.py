"""Gradient bytes and accuracy of ring attention: ours beside ring-flash-attention and USP.

python benchmarks/attention_peers.py --out benchmarks/results/attention-peers-cpu.json [--dry]

Real ranks over gloo on the CPU in bfloat16, the dtype that both peers support. Their code is
installed by pip into a folder that is deleted at the end; the two private functions of flash-attn
that they call are stood in for by torch's CPU kernel, which ours runs on too. Bytes are counted
where each calls torch.distributed, results compared with float64 on one device. `--dry` runs ours
alone, on two ranks, and installs nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import result
import torch
from peers import ranks
from peers.install import SOURCES, commit_of, install
from peers.ranks import NAMES, Shape
from torch import Tensor

from stretto.cluster import detect
from stretto.ops.attention import backends, naive
from stretto.plan.options import Context, Ring
from stretto.testing.ranks import run_ranks

#: What a peer's dK and dV bytes are held against: ours must be at most this part of them.
MOST_OF_PEERS = 0.55
OURS = "ours, ring"
OURS_WITHOUT_PRUNING = "ours, ring unpruned"


@dataclass(frozen=True)
class Entry:
    """One implementation: its name, the body of a rank, mesh axes, and the body's arguments."""

    who: str
    body: Callable[..., dict[str, Any]]
    sizes: dict[str, int]
    arguments: tuple
    peer: str | None = None


def main() -> int:
    options = arguments()
    device = f"CPU: {detect.cpu().name}, gloo ranks of one thread"
    found = result.begin("attention peers", device, commit())
    found["peers"] = {name: commit_of(source) for name, source in options.sources.items()}
    with tempfile.TemporaryDirectory(prefix="stretto-peers-") as folder:
        if not options.dry:
            install(Path(folder), options.sources)
        for shape in shapes(options):
            found["rows"] += compared(shape, folder, options)
            found["summary"] = summary(found["rows"])
            result.write(options.out, found)
            show(found["rows"], shape)
    print(found["summary"])
    return 0 if options.dry or found["summary"]["ok"] else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--out", type=Path, default=Path("out/attention-peers.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="ours alone, two ranks, few rows")
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name}", default=source, metavar="SOURCE", help=f"pip: {source}")
    options = parser.parse_args()
    options.sources = {name: getattr(options, name.replace("-", "_")) for name in SOURCES}
    return options


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def shapes(options: argparse.Namespace) -> list[Shape]:
    """Every rank count with one key head per query head, and with one for four."""
    if options.dry:
        return [Shape(ranks=2, rows=16, heads=4, kv_heads=kv, head_dim=16) for kv in (4, 1)]
    counts = (2, 4, 8)
    return [
        Shape(ranks=n, rows=256, heads=8, kv_heads=kv, head_dim=64) for kv in (8, 2) for n in counts
    ]


def entries(shape: Shape, folder: str, repeats: int, *, dry: bool) -> Iterator[Entry]:
    """What is compared at a shape; every entry of ours does what the peer beside it does."""
    plans = {
        OURS: Context(ring=shape.ranks, schedule=Ring()),
        OURS_WITHOUT_PRUNING: Context(ring=shape.ranks, schedule=Ring(prune=False)),
    }
    if shape.ranks > 2:
        plans["ours, ulysses 2 x ring"] = Context(ulysses=2, ring=shape.ranks // 2, schedule=Ring())
    for who, plan in plans.items():
        yield Entry(who, ranks.ours, plan.sizes, (shape, plan, repeats))
    if dry:
        return
    plain, both = {"ring_out": shape.ranks}, (shape, folder, repeats)
    name = "ring-flash-attention"
    yield Entry(f"{name}, zigzag", ranks.ring_flash_attention, plain, both, name)
    yield Entry("usp, ring zigzag", ranks.usp, plain, both, "yunchang")
    if shape.ranks > 2:
        yield Entry("usp, ulysses 2 x ring zigzag", ranks.usp, plain, (*both, 2), "yunchang")


def compared(shape: Shape, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all implementations at one shape."""
    known = reference(shape)
    rows = [_row(shape, "one device", None, known, one_device(shape), {})]
    for entry in entries(shape, folder, options.repeats, dry=options.dry):
        told = run_ranks(entry.body, entry.sizes, *entry.arguments, timeout_s=180)
        bytes_of = {
            f"{name}_bytes": [own[name] for own in told]
            for name in ("forward", "gradients", "backward")
        }
        bytes_of["ms"] = [max(times) for times in zip(*(own["ms"] for own in told), strict=True)]
        rows.append(_row(shape, entry.who, entry.peer, known, whole(told, known), bytes_of))
    return rows


def reference(shape: Shape) -> dict[str, Tensor]:
    """The same attention in float64 on one device."""
    q, k, v, dout = (x.double() for x in shape.inputs())
    seen = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril()
    out, _ = naive.attention(q, k, v, seen)
    return dict(zip(NAMES, (out, *naive.attention_backward(dout, q, k, v, seen)), strict=True))


def one_device(shape: Shape) -> dict[str, Tensor]:
    """In bfloat16 by the kernel that all use: what rounding costs without any splitting."""
    q, k, v, dout = (x.movedim(2, 0).contiguous() for x in shape.inputs())
    backend, scale = backends.BACKENDS["cpu"], shape.head_dim**-0.5
    out, lse = backends.forward(q, k, v, "causal", scale, backend)
    grads = backends.backward(dout, q, k, v, out, lse, "causal", scale, backend)
    return {name: x.movedim(0, 2) for name, x in zip(NAMES, (out, *grads), strict=True)}


def whole(told: list[dict[str, Any]], known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's rows at their positions; what nobody returned stays NaN."""
    found = {name: torch.full_like(value, float("nan")) for name, value in known.items()}
    for own in told:
        for name, value in own["results"].items():
            found[name][:, :, own["rows"]] = value.double()
    return found


def _row(shape, who, peer, known, found, more) -> dict[str, Any]:
    """Relative root mean square errors, and bytes of the rank that sends most and of all."""
    row = {
        "who": who,
        "peer": peer,
        "ranks": shape.ranks,
        "heads": f"{shape.heads}:{shape.kv_heads}",
        "rows": shape.rows,
        "head_dim": shape.head_dim,
        "ms": more.get("ms", []),
        "error": {name: error(found[name], known[name]) for name in NAMES},
    }
    for name in ("forward", "gradients", "backward"):
        sent = more.get(f"{name}_bytes", [0])
        row[f"{name}_bytes"] = max(sent)
        row[f"{name}_bytes_all_ranks"] = sum(sent)
        row[f"{name}_blocks"] = max(sent) / shape.block_bytes
    return row


def error(found: Tensor, right: Tensor) -> float:
    apart = (found.double() - right).square().mean().sqrt()
    return float(apart / right.square().mean().sqrt())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over the peers' of the same shape: bytes of the busiest rank, the larger error."""
    gradients, backward, errors = {}, {}, {}
    for row in rows:
        if row["peer"]:
            ours = _ours(rows, row)
            name = f"{row['who']}, {row['ranks']} ranks, {row['heads']}"
            gradients[name] = ours["gradients_bytes"] / row["gradients_bytes"]
            backward[name] = ours["backward_bytes"] / row["backward_bytes"]
            errors[name] = max(ours["error"].values()) / max(row["error"].values())
    worst = max(gradients.values(), default=None)
    return {
        "gradients_over_peer": gradients,
        "gradients_over_peer_worst": worst,
        "backward_over_peer": backward,
        "error_over_peer": errors,
        "error_over_peer_worst": max(errors.values(), default=None),
        "ok": worst is not None and worst <= MOST_OF_PEERS,
    }


def _ours(rows: list[dict[str, Any]], peer: dict[str, Any]) -> dict[str, Any]:
    """Our row of the same shape and degrees, without pruning: peers send whole blocks."""
    wanted = "ours, ulysses 2 x ring" if "ulysses" in peer["who"] else OURS_WITHOUT_PRUNING
    shape = (peer["ranks"], peer["heads"], wanted)
    return next(row for row in rows if (row["ranks"], row["heads"], row["who"]) == shape)


def show(rows: list[dict[str, Any]], shape: Shape) -> None:
    print(f"{shape.ranks} ranks, {shape.heads}:{shape.kv_heads} heads, {shape.rows} rows each")
    for row in rows:
        if (row["ranks"], row["heads"]) == (shape.ranks, f"{shape.heads}:{shape.kv_heads}"):
            errors = " ".join(f"{name} {value:.2e}" for name, value in row["error"].items())
            blocks = [row[f"{name}_blocks"] for name in ("forward", "gradients", "backward")]
            sent = "forward {:.2f}, dK dV {:.2f}, backward {:.2f} blocks".format(*blocks)
            print(f"  {row['who']:30} {sent}; {errors}")


def commit() -> str:
    """Of the tree this script is in."""
    words = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
