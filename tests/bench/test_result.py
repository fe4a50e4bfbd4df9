"""Result files of benchmarks: whole or not at all."""

import json

import pytest

from stretto.bench import result


def test_document_says_where_it_comes_from(tmp_path):
    document = result.begin("case", "a device", repeats=3)
    document["summary"]["infinite"] = float("inf")
    result.end(document)
    result.write(tmp_path / "new" / "r.json", document)
    read = json.loads((tmp_path / "new" / "r.json").read_text())
    assert read["stretto"] == "result/1"
    assert read["basis"] == "measured"
    assert read["repeats"] == 3
    assert read["versions"].keys() >= {"stretto", "torch", "diffusers"}
    assert read["load"].keys() == {"before", "after"}
    assert read["summary"] == {"infinite": None}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "r.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        result.write(file, {"rows": object()})
    assert file.read_text() == "old"
    assert [left.name for left in tmp_path.iterdir()] == ["r.json"]


def test_busy_is_more_than_half_the_cores():
    document = result.begin("case", "a device")
    document["load"]["before"] = document["cores"] / 2 + 0.1
    result.end(document)
    assert document["busy"]
