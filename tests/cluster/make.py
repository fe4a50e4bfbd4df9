"""Small clusters for tests; figures are invented."""

from stretto import documents
from stretto.cluster.model import Cluster


def device(**changes):
    return {
        "memory": "1 GiB",
        "memory_rate": "1 GB/s",
        "fp32": "1 TFLOP/s",
        "source": "invented",
        **changes,
    }


def node(name, kind, count):
    return {"name": name, "devices": f"{count} x {kind}"}


def link(**changes):
    return {"rate": "1 GB/s", "latency": "10 us", **changes}


def cluster(devices=None, nodes=None, links=None):
    """Two equal devices in one node, unless said otherwise. Raises ConfigError."""
    fields = {
        "name": "test",
        "basis": "projected",
        "devices": devices or {"d": device()},
        "nodes": [node("n", "d", 2)] if nodes is None else nodes,
        "links": [link(within="n")] if links is None else links,
    }
    return documents.make(Cluster, fields)


def line(count, rate=1e9, latency=1e-5, **changes):
    """`count` equal devices in one node."""
    within = [link(within="n", rate=rate, latency=latency, **changes)] if count > 1 else []
    return cluster(nodes=[node("n", "d", count)], links=within)
