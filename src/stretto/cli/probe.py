"""`stretto probe`: measure devices and links of this machine, and write them as a cluster."""

from __future__ import annotations

import datetime
import json as jsonlib
import os
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter

from stretto import documents
from stretto.cli.limits import check_ranks
from stretto.cli.whole import AT_LEAST_1
from stretto.cluster import detect
from stretto.cluster.model import Cluster, Device, Link, Node
from stretto.cost.fit import Fit, fit_link
from stretto.mesh import probe as measuring
from stretto.mesh.probe import Measured
from stretto.quantities import short

#: Ranks by default on a machine without GPUs; more say little more and take longer.
MOST_RANKS = 4


def probe(
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("cluster.yaml"),
    ranks: Annotated[int | None, AT_LEAST_1] = None,
    force: bool = False,
    json: bool = False,
) -> int:
    """Measure this machine's devices and the links between ranks, and write a cluster file.

    Takes about ten seconds, and refuses while the machine is busy.

    Parameters
    ----------
    out
        Where the cluster is written.
    ranks
        Processes that measure together; by default one per GPU, else one per core up to 4.
    force
        Measure although the machine is busy; the load is written into the file.
    json
        Print one JSON object with every sample.
    """
    load, cores = os.getloadavg()[0], detect.usable_cores()
    if not force:
        measuring.refuse_load(load, cores)
    documents.check_writable(out)
    gpus = detect.gpus()
    count = ranks or (gpus[0].count if gpus else min(cores, MOST_RANKS))
    check_ranks(count)
    measured = measuring.probe(count)
    link = fit_link(measured.messages) if measured.messages else None
    cluster = describe(measured, link, load=load)
    cluster.write(out)
    if json:
        print(jsonlib.dumps(_as_dict(measured, cluster, link, load), indent=2))
    else:
        print("\n".join([*_lines(measured, link), f"written: {out}"]))
    return 0


def describe(measured: Measured, link: Fit | None, *, load: float) -> Cluster:
    """The cluster that the samples show: one node of equal devices, one link between them.

    A dtype's rate is its best over the grid. Figures are rounded to four digits.
    """
    today = datetime.date.today().isoformat()
    on = f"stretto probe {today}, load {load:.2f}"
    rates = {name: _four(rate) for name, rate in _best_rates(measured).items()}
    found = (detect.gpus() if measured.device == "cuda" else None) or [detect.cpu()]
    memory = found[0].memory_bytes // (1 if measured.device == "cuda" else measured.ranks)
    device = Device(
        memory=memory // 2**26 * 2**26,
        memory_rate=_four(measured.memory_rate),
        source=f"measured: {on}, {found[0].name}, {measured.ranks} rank(s) at once",
        **rates,
    )
    links = []
    if link is not None:
        source = f"measured: {on}, {measured.backend}, {len(measured.messages)} messages"
        links = [
            Link(
                within="here",
                rate=_four(link.rate),
                latency=_four(link.latency),
                spread=_four(link.spread),
                source=source,
            )
        ]
    return Cluster(
        name=f"{measured.ranks} x {found[0].name}",
        basis="measured",
        date=today,
        software=f"torch {torch.__version__}",
        devices={measured.device: device},
        nodes=(Node(name="here", devices=(measured.device, measured.ranks)),),
        links=tuple(links),
    )


def _best_rates(measured: Measured) -> dict[str, float]:
    best: dict[str, float] = {}
    for product in measured.products:
        best[product.dtype] = max(best.get(product.dtype, 0.0), product.flop_rate)
    return best


def _four(value: float) -> float:
    return float(f"{value:.4g}")


def _lines(measured: Measured, link: Fit | None) -> list[str]:
    lines = [f"{measured.ranks} rank(s) on {measured.device}, all at work, per rank:"]
    for name, rate in _best_rates(measured).items():
        lines.append(f"  matmul {name}  {short('FLOP/s', rate)}")
    lines.append(f"  memory copy  {short('B/s', measured.memory_rate)} read and written")
    if link is None:
        return [*lines, "  no link: one rank"]
    lines.append(
        f"  link over {measured.backend}: {short('B/s', link.rate)}, "
        f"{short('s', link.latency)} a hop; relative rms error of the fit {link.spread:.0%}"
    )
    for verb in dict.fromkeys(message.verb for message in measured.messages):
        times = [m for m in measured.messages if m.verb == verb]
        ends = [f"{short('s', m.seconds)} at {m.num_bytes} B" for m in (times[0], times[-1])]
        lines.append(f"    {verb:<10} {', '.join(ends)}")
    return lines


def _as_dict(measured: Measured, cluster: Cluster, link: Fit | None, load: float) -> dict:
    return {
        "cluster": cluster.model_dump(mode="json", exclude_none=True),
        "load": load,
        "basis": "measured",
        "fit": None if link is None else vars(link),
        "products": [{**vars(p), "flop_rate": p.flop_rate} for p in measured.products],
        "messages": [vars(m) for m in measured.messages],
    }
