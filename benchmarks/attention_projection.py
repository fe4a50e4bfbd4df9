"""Training steps on clusters nobody here has: projected, beside what StarTrail published.

PYTHONPATH=src python benchmarks/attention_projection.py --out projection.json [--kernels F.json]

Seconds of a whole step (attention by exact bytes, kernel rates and the links of a cluster preset;
other layers by their FLOP) under the published ring, StarTrail at its best team, USP at its best
degree, and the plan that `find_plans` chooses. `--kernels` takes the rates of a file that
attention_kernels.py wrote in place of the preset's. Nothing in the result is measured here.

Published (StarTrail, NeurIPS 2025): up to +77.12 % throughput over ring attention for GPT and
+114.33 % for DiT, on 32 to 64 GPUs, one key head per query head, bf16, batch 1, 64k to 512k tokens.
The projection differs because it knows neither the exchange of weights nor the host, and takes a
message between nodes to have one interface: where links bound the ring, the ratio of link times
is all that is left. It ranks plans; it does not reproduce a run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import result

from stretto.cluster.model import Cluster, Kernel
from stretto.search.attention import TrainChoice, TrainRanking, rank_plans
from stretto.workload.train import Training

CLUSTERS = ("h100-8x8", "a100-2x16", "a100-4x8", "a100-8x4")
MODELS = ("gpt3-2.7b", "gpt3-6.7b", "dit-xl", "llama3-8b")
TOKENS = (1 << 16, 1 << 17, 1 << 18, 1 << 19)
PUBLISHED = {"gpt": 77.12, "dit": 114.33}
#: Families of named points by the key of their row.
FAMILIES = {"ring": "ring", "startrail": "startrail", "usp": "usp"}
_KEYS = ("startrail", "usp", "choice")
Row = dict[str, Any]


def kernel_of(measured: dict[str, Any], backend: str = "cudnn") -> Kernel:
    """The rates in a result of attention_kernels.py: rectangles replayed as CUDA graphs.

    Raises SystemExit when the file has none of that back end.
    """
    curve = []
    for row in measured["rows"]:
        who = row["who"].split("/")
        rates = row.get("tflops", {})
        if who[:3] == ["blocks", backend, "full"] and "forward_graph" in rates:
            curve.append((int(who[3]), rates["forward_graph"], rates["backward_graph"]))
    if not curve:
        raise SystemExit(f"no rows blocks/{backend}/full/* with graph rates in that file")
    curve.sort()
    forward, backward = (max(entry[side] for entry in curve) for side in (1, 2))
    short = tuple((rows, f / forward, b / backward) for rows, f, b in curve)
    source = f"measured: {measured['case']} on {measured['device']}, {measured.get('date', '')}"
    return Kernel(forward=forward * 1e12, backward=backward * 1e12, short=short, source=source)


def with_kernel(cluster: Cluster, kernel: Kernel | None) -> Cluster:
    """The cluster with a measured kernel for the device kind that it was measured on."""
    if kernel is None:
        return cluster
    devices = {
        kind: device.model_copy(update={"attention": kernel})
        if kind.lower() in kernel.source.lower()
        else device
        for kind, device in cluster.devices.items()
    }
    return cluster.model_copy(update={"devices": devices})


def rows(cluster: Cluster, name: str, model: str, tokens: int) -> Iterator[Row]:
    """A row for the ring, the best StarTrail, the best USP and the choice."""
    ranking = rank_plans(Training.of(model, tokens), cluster)
    chosen = {key: best(ranking, family) for key, family in FAMILIES.items()}
    chosen["choice"] = ranking.choices[0]
    ring, usp = chosen["ring"], chosen["usp"]
    for key, choice in chosen.items():
        if choice is not None:
            yield {
                "who": f"{name}/{model}/{tokens}/{key}",
                "basis": "projected",
                "cluster": name,
                "model": model,
                "tokens": tokens,
                "key": key,
                "plan": str(choice.plan.cp.short()),
                "seconds": choice.estimate.seconds,
                "interval": list(choice.estimate.interval),
                "attention_seconds": choice.estimate.attention_seconds,
                "sent_bytes_per_rank": choice.estimate.sent_bytes,
                "busiest_interface_bytes": choice.estimate.interface_bytes,
                "memory_bytes": choice.estimate.memory.total,
                "over_ring_percent": gain(ring, choice),
                "over_ring_interval": gains(ring, choice),
                "over_usp_percent": gain(usp, choice),
            }


def best(ranking: TrainRanking, family: str) -> TrainChoice | None:
    """The fastest named point of a family that fits."""
    found = (c for c in ranking.choices if c.name.partition("(")[0] == family)
    return next((c for c in found if " x " not in c.name), None)


def gain(base: TrainChoice | None, choice: TrainChoice) -> float | None:
    """Throughput above that of another plan, percent."""
    if base is None:
        return None
    return 100 * (base.estimate.seconds / choice.estimate.seconds - 1)


def gains(base: TrainChoice | None, choice: TrainChoice) -> list[float] | None:
    """The same with all messages hidden for both plans, and with none hidden for both."""
    if base is None:
        return None
    pairs = zip(base.estimate.interval, choice.estimate.interval, strict=True)
    return [100 * (theirs / ours - 1) for theirs, ours in pairs]


def summary(found: list[Row]) -> dict[str, Any]:
    """Largest gains over the ring by kind of model, beside those published."""
    out: dict[str, Any] = {"basis": "projected"}
    for kind, published in PUBLISHED.items():
        own = [row for row in found if row["model"].startswith(kind)]
        out[f"published_over_ring_{kind}_percent"] = published
        for key in _KEYS:
            gained = [row["over_ring_percent"] for row in own if row["key"] == key]
            gained = [each for each in gained if each is not None]
            out[f"{key}_over_ring_{kind}_percent"] = max(gained, default=None)
            out[f"{key}_over_ring_{kind}_least_percent"] = min(gained, default=None)
    return out


def table(found: list[Row]) -> list[str]:
    """One line per cluster, model and length: seconds of the four, gains over the ring."""
    head = f"{'cluster':<10} {'model':<10} {'tokens':>7} {'ring':>9}"
    head += "".join(f" {name:>9} {'gain':>7}" for name in _KEYS)
    lines = [head + "  choice is"]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in found:
        groups.setdefault((row["cluster"], row["model"], row["tokens"]), {})[row["key"]] = row
    for (cluster, model, tokens), own in groups.items():
        text = f"{cluster:<10} {model:<10} {tokens:>7} {_seconds(own.get('ring'))}"
        for key in _KEYS:
            row = own.get(key)
            gained = row["over_ring_percent"] if row else None
            text += f" {_seconds(row)} " + ("      -" if gained is None else f"{gained:>+6.0f}%")
        lines.append(f"{text}  {own['choice']['plan']}")
    return lines


def _seconds(row: Row | None) -> str:
    return f"{'-':>9}" if row is None else f"{row['seconds']:>8.3g}s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, help="a file of attention_kernels.py")
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--commit", default="")
    parser.add_argument("--dry", action="store_true", help="one small case")
    options = parser.parse_args()
    kernel = kernel_of(json.loads(options.kernels.read_text())) if options.kernels else None
    lengths = [int(each) for each in options.tokens.split(",")]
    clusters, models = options.clusters.split(","), options.models.split(",")
    if options.dry:
        clusters, models, lengths = clusters[:1], models[:1], lengths[:1]
    found = result.begin("attention/projection", "none: projected", options.commit)
    found |= {"basis": "projected", "kernel": kernel.source if kernel else "of the presets"}
    for name in clusters:
        cluster = with_kernel(Cluster.read(name), kernel)
        for model in models:
            for tokens in lengths:
                found["rows"] += rows(cluster, name, model, tokens)
                found["summary"] = summary(found["rows"])
                result.write(options.out, found)
    print("\n".join(table(found["rows"])))
    for kind, published in PUBLISHED.items():
        own = {key: found["summary"][f"{key}_over_ring_{kind}_percent"] for key in _KEYS}
        words = ", ".join(f"{key} +{_percent(value)}" for key, value in own.items())
        print(f"{kind}: largest over the ring, projected: {words}; published: +{published} %")


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f} %"


if __name__ == "__main__":
    main()
