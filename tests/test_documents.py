"""Files of the nouns: strict, with line numbers, written whole."""

import pytest

from stretto import documents
from stretto.cluster.model import Cluster
from stretto.errors import ConfigError

CLUSTER = """\
stretto: cluster/1
name: two
basis: measured
devices:
  a: {memory: 1 GiB, memory_rate: 1 GB/s, fp32: 1 GFLOP/s, source: here}
nodes: [{name: n, devices: 2 x a}]
links:
  - {within: n, rate: 1 GB/s, latency: 1 us}
"""


def written(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_every_fault_names_file_line_and_field(tmp_path):
    text = CLUSTER.replace("rate: 1 GB/s, latency", "rate: 1 GB, latenz")
    path = written(tmp_path, text.replace("basis: measured", "basis: guessed"))
    with pytest.raises(ConfigError) as caught:
        Cluster.read(path)
    message = str(caught.value)
    assert f"{path}:3: basis: Input should be 'measured'" in message
    assert f"{path}:8: links.0.rate: '1 GB' is no quantity" in message
    assert f"{path}:8: links.0.latenz: Extra inputs are not permitted" in message


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("stretto: plan/1\n", "starts with `stretto: plan/1`, needed is `stretto: cluster/1`"),
        ("[1, 2]", "starts with `stretto: None`"),
        ("", "starts with `stretto: None`"),
        ("a: [", "is not YAML"),
    ],
)
def test_other_files_are_refused(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match):
        Cluster.read(written(tmp_path, text))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = written(tmp_path, CLUSTER)
    cluster = Cluster.read(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        cluster.write(path)
    assert path.read_text() == CLUSTER
    assert list(tmp_path.iterdir()) == [path]


def test_make_names_the_noun():
    with pytest.raises(ConfigError, match="Cluster: name: Field required"):
        documents.make(Cluster, {})


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*it is a folder"):
        documents.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="nothing can be written into"):
        documents.check_writable(tmp_path / "file" / "r.json")
    with pytest.raises(ConfigError, match="name too long"):
        documents.check_writable(tmp_path / ("r" * 300))
    documents.check_writable(tmp_path / "new" / "r.json")
    assert not (tmp_path / "new").exists()
