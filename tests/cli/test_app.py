"""Exit codes and where errors go."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import stretto
from stretto.cli import app as cli
from stretto.errors import PlanMismatch
from stretto.mesh import launch

#: `stretto generate`, telling when the ranks' server is on its way.
GENERATE = """
import sys
from stretto.cli import app, generate
from stretto.mesh import launch

def prepare(*given, **more):
    launch.prepare(*given, **more)
    print("importing", flush=True)

generate.prepare = prepare
sys.exit(app.main(["generate", "--ranks", "2", "--out", sys.argv[1]]))
"""


def raises(error):
    """A command that ends with `error`, put in place of the table of commands."""

    def command():
        raise error

    table = cli.App(name="stretto", result_action="return_value")
    table.command(command, name="fail")
    return lambda: table


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == stretto.__version__


def test_unknown_command_is_2_and_names_the_nearest(capsys):
    assert cli.main(["docto"]) == 2
    assert '"doctor"' in capsys.readouterr().err


def test_unknown_flag_is_2():
    assert cli.main(["doctor", "--jsno"]) == 2


def test_error_of_the_tree_is_2_without_a_traceback(monkeypatch, capsys):
    error = PlanMismatch('mesh["step"] has 3 ranks, the plan needs 4')
    monkeypatch.setattr(cli, "build", raises(error))
    assert cli.main(["fail"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == 'PlanMismatch: mesh["step"] has 3 ranks, the plan needs 4\n'


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "build", raises(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(cli, "COMMANDS", {"wait": (f"{__name__}:interrupted", "Wait.")})
    monkeypatch.setattr(launch, "abandon", lambda: ended.append(True))
    assert cli.main(["wait"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert ended


@pytest.mark.ranks
def test_an_interrupt_while_torch_is_imported_leaves_no_traceback(tmp_path):
    """Ctrl-C goes to the whole group: this process, and the server that imports for the ranks."""
    with subprocess.Popen(
        [sys.executable, "-c", GENERATE, str(tmp_path / "out")],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "importing\n"
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert told == "interrupted\n"
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "generate --steps 1e30",
        "generate calibrate --steps 1e9",
        "generate calibrate --calls 1e30",
        "generate calibrate --holdout 1e30",
        "explain plan.yaml --steps 1e30",
    ],
)
def test_a_slip_of_the_exponent_is_refused_by_the_name_of_its_flag(words, capsys):
    flag = words.split()[-2]
    assert cli.main(words.split()) == 2
    told = capsys.readouterr().err
    assert f"for {flag}" in told
    assert "10000" in told


def test_a_reader_that_has_closed_ends_the_command_without_a_traceback():
    """As `stretto doctor --json | head -1`."""
    command = [sys.executable, "-m", "stretto", "doctor", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_output_is_told_in_one_line():
    command = [sys.executable, "-m", "stretto", "doctor", "--json"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "cannot write: No space left on device\n"
