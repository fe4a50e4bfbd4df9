"""Exit codes and where errors go."""

import pytest

import stretto
from stretto.cli import app as cli
from stretto.errors import PlanMismatch


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
