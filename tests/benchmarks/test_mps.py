"""The daemon is told to quit whatever happens, in directories of its own."""

import os
import subprocess
from pathlib import Path

import mps
import pytest


@pytest.fixture
def control(tmp_path, monkeypatch):
    """A stand-in for the control program that writes down how it was called."""
    log = tmp_path / "log"
    program = tmp_path / mps.CONTROL
    program.write_text(
        "#!/bin/sh\n"
        f'echo "args=$* pipe=$CUDA_MPS_PIPE_DIRECTORY" >> {log}\n'
        f'[ "$1" = -d ] || cat >> {log}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return log


def test_starts_and_quits_in_its_own_directories(control):
    with mps.daemon() as environment:
        pipe = environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert Path(pipe).is_dir()
    lines = control.read_text().splitlines()
    assert lines == [f"args=-d pipe={pipe}", f"args= pipe={pipe}", "quit -t 10"]
    assert not Path(pipe).exists()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_quits_after_a_failure(control, kind):
    with pytest.raises(kind), mps.daemon():
        raise kind("inside")
    assert control.read_text().splitlines()[-1] == "quit -t 10"


def test_a_daemon_that_does_not_start_is_an_error(control):
    control.parent.joinpath(mps.CONTROL).write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError), mps.daemon():
        pytest.fail("entered")


@pytest.mark.parametrize(("ranks", "percent"), [(8, "12"), (4, "25"), (3, "33")])
def test_slices_are_equal_and_fit(ranks, percent):
    assert mps.slice_environment(ranks) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percent}
