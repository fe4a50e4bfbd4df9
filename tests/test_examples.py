"""The examples in one process at toy size; examples/generate.py, on ranks, is in test_docs.py."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def output_of(monkeypatch, capsys):
    """A function that runs an example with environment variables and returns what it printed."""

    def run(name, **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, str(value))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_emulate_compares_schedules_of_one_depth(output_of):
    said = output_of("emulate.py", STEPS=8)
    rows = re.findall(r"^(\S.*?) +depth +(\d+) +(\d+\.\d) dB$", said, re.MULTILINE)
    assert [who for who, _, _ in rows] == ["parastep", "tail", "fewer steps"]
    assert len({depth for _, depth, _ in rows}) == 1


def test_calibrated_writes_a_file_and_runs_it(output_of, tmp_path):
    said = output_of("calibrated.py", STEPS=4, CALLS=1, RANKS=2, OUT=tmp_path)
    assert (tmp_path / "calibration.yaml").is_file()
    used = re.search(r"step2\(listed ([\d ]+),", said)[1]
    assert f"windows {used}\n" in said


def test_a_loop_of_your_own_learns(output_of):
    said = output_of("train.py", STEPS=20)
    first, last = re.findall(r"loss (\d+\.\d+)", said)
    assert float(last) < float(first) < 5.6  # log 256 is 5.5


@pytest.mark.ranks
def test_a_loop_of_your_own_prints_the_same_on_two_ranks(output_of):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, EXAMPLES / "train.py"],
        env={**os.environ, "STEPS": "20"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output_of("train.py", STEPS=20)
