"""A file of metrics, whatever happened to the run that wrote it."""

from stretto.train import metrics


def test_a_cut_last_line_of_metrics_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert metrics.read(file) == [{"step": 1}]
    assert metrics.read(tmp_path / "absent") == []
