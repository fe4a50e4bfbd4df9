"""The projection: rates from a measured file, gains of one length, and the words that label it."""

import json

import attention_projection as projection
import pytest

from stretto.cluster.model import Cluster

MEASURED = {
    "case": "attention/kernels",
    "device": "NVIDIA H100 80GB HBM3",
    "date": "2026-11-25",
    "rows": [
        {"who": f"blocks/{name}/{kind}/{rows}", "tflops": {"forward_graph": f, "backward_graph": b}}
        for name, kind, rows, f, b in (
            ("cudnn", "full", 4096, 600.0, 400.0),
            ("cudnn", "full", 1024, 300.0, 500.0),
            ("cudnn", "causal", 512, 1.0, 1.0),
            ("flash", "full", 4096, 2.0, 2.0),
        )
    ]
    + [{"who": "path/cudnn/x"}],
}


def test_rates_come_from_rectangles_of_one_back_end():
    kernel = projection.kernel_of(MEASURED)
    assert (kernel.forward, kernel.backward) == (600e12, 500e12)
    assert kernel.short == ((1024, 0.5, 1.0), (4096, 1.0, 0.8))
    assert kernel.source.startswith("measured: attention/kernels on NVIDIA H100")


def test_a_file_without_rates_is_refused():
    with pytest.raises(SystemExit, match="no rows blocks/cudnn/full"):
        projection.kernel_of(MEASURED | {"rows": []})


def test_measured_rates_replace_those_of_the_device_they_were_measured_on():
    kernel = projection.kernel_of(MEASURED)
    h100 = projection.with_kernel(Cluster.read("h100-8x8"), kernel)
    assert h100.devices["h100"].attention == kernel
    a100 = Cluster.read("a100-4x8")
    assert projection.with_kernel(a100, kernel) == a100


def test_the_choice_is_never_behind_the_published_plans():
    found = list(projection.rows(Cluster.read("h100-8x8"), "h100-8x8", "gpt3-6.7b", 1 << 16))
    own = {row["key"]: row for row in found}
    assert set(own) == {"ring", "startrail", "usp", "choice"}
    assert own["ring"]["over_ring_percent"] == 0
    assert own["choice"]["seconds"] <= min(row["seconds"] for row in found) * 1.001
    assert own["startrail"]["over_ring_percent"] > 77
    least, most = own["startrail"]["over_ring_interval"]
    assert least > 0 or most > 0
    text = "\n".join(projection.table(found))
    assert own["choice"]["plan"] in text


def test_a_dry_run_says_projected(dry):
    found, printed = dry("attention_projection.py")
    assert json.dumps(found).count('"projected"') >= len(found["rows"])
    assert found["summary"]["published_over_ring_gpt_percent"] == 77.12
    assert "published: +77.12 %" in printed
    assert {row["basis"] for row in found["rows"]} == {"projected"}
