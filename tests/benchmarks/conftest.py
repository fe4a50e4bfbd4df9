"""Benchmarks are plain scripts: their folder becomes importable, their runs get processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"

sys.path.insert(0, str(FOLDER))
sys.path.insert(0, str(ROOT / "docs"))


@pytest.fixture
def dry(tmp_path):
    """Run a script with `--dry`; the result it wrote, and what it printed."""

    def run(script, *arguments):
        out = tmp_path / "result.json"
        words = [sys.executable, str(FOLDER / script), "--dry", "--out", str(out), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text()), done.stdout

    return run


def check_format(result):
    """The keys of result/1 that every benchmark writes, and that docs can say what it found."""
    from rendering import sections, targets

    assert result["stretto"] == "result/1"
    assert result["basis"] == "measured"
    for key in ("case", "device", "command", "commit", "versions", "load", "rows", "summary"):
        assert key in result, key
    for row in result["rows"]:
        assert {"who", "ms"} <= row.keys()
    assert sections.SECTIONS[sections.kind_of(result["case"])](result)
    list(targets.lines({"dry": result}))
