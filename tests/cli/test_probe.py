"""`stretto probe`: the cluster it writes, and what it refuses before measuring."""

import json

import pytest

from stretto.cli import app
from stretto.cli import probe as command
from stretto.cluster.model import Cluster
from stretto.cost.comm import hops
from stretto.cost.fit import fit_link
from stretto.mesh import probe as measuring
from stretto.mesh.probe import MESSAGE_BYTES, Measured, Message, Product


def measured(ranks=2):
    """What ranks on an exact 1 GB/s link with 10 us latency would have seen."""
    verbs = (("all_gather", ranks), ("broadcast", ranks), ("permute", 2))
    messages = [
        Message(verb, n, r, hops(verb, r) * (1e-5 + n / 1e9))
        for n in MESSAGE_BYTES
        for verb, r in verbs
    ]
    products = (Product("fp32", 256, 1e-3), Product("fp32", 512, 4e-3), Product("bf16", 256, 1.0))
    return Measured(ranks, "cpu", "gloo", 5e9, products, tuple(messages) if ranks > 1 else ())


@pytest.fixture
def instant(monkeypatch):
    """Ranks that answer at once, on a machine that is idle."""
    asked = []

    def probe(ranks):
        asked.append(ranks)
        return measured(ranks)

    monkeypatch.setattr(measuring, "probe", probe)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return asked


def test_the_file_is_the_cluster_that_was_seen(instant, tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    assert app.main(["probe", "-o", str(path), "--ranks", "3"]) == 0
    assert instant == [3]
    found = Cluster.read(path)
    assert (found.size, found.basis) == (3, "measured")
    assert found.device(0).fp32 == pytest.approx(2 * 512**3 / 4e-3, rel=1e-3)
    assert found.device(0).fp16 is None
    assert found.link(0, 2).rate == pytest.approx(1e9, rel=1e-3)
    assert found.link(0, 2).latency == pytest.approx(1e-5, rel=1e-3)
    assert found.software.startswith("torch ")
    out = capsys.readouterr().out
    assert "matmul fp32" in out
    assert f"written: {path}" in out


def test_one_rank_is_a_cluster_without_links(instant, tmp_path):
    path = tmp_path / "cluster.yaml"
    assert app.main(["probe", "-o", str(path), "--ranks", "1"]) == 0
    assert Cluster.read(path).links == ()


def test_json_holds_every_sample(instant, tmp_path, capsys):
    assert app.main(["probe", "-o", str(tmp_path / "c.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["messages"]) % len(MESSAGE_BYTES) == 0
    assert found["products"][0]["flop_rate"] == 2 * 256**3 / 1e-3
    assert found["basis"] == "measured"


def test_a_busy_machine_is_refused_unless_forced(instant, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    path = tmp_path / "cluster.yaml"
    assert app.main(["probe", "-o", str(path)]) == 2
    assert "load average 99.00" in capsys.readouterr().err
    assert instant == []
    assert not path.exists()
    assert app.main(["probe", "-o", str(path), "--force"]) == 0
    assert "load 99.00" in Cluster.read(path).device(0).source


def test_a_folder_is_no_place_for_a_file(instant, tmp_path, capsys):
    assert app.main(["probe", "-o", str(tmp_path)]) == 2
    assert "a folder" in capsys.readouterr().err
    assert instant == []


@pytest.mark.parametrize("ranks", ["0", "1.5", "1000000"])
def test_no_ranks_parts_of_ranks_and_too_many_are_refused(ranks, instant, tmp_path):
    assert app.main(["probe", "--ranks", ranks, "-o", str(tmp_path / "c.yaml")]) == 2
    assert instant == []


def test_rates_are_those_of_the_best_size():
    cluster = command.describe(measured(), fit_link(measured().messages), load=0.0)
    assert cluster.device(0).bf16 == pytest.approx(2 * 256**3, rel=1e-3)


@pytest.mark.ranks
def test_real_ranks_make_a_cluster_that_reads_back(tmp_path):
    path = tmp_path / "cluster.yaml"
    assert app.main(["probe", "-o", str(path), "--ranks", "2", "--force"]) == 0
    found = Cluster.read(path)
    assert found.size == 2
    assert found.link(0, 1).rate > 0
