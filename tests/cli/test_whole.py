"""Whole numbers of a command line: never rounded."""

import pytest

from stretto.cli import app, whole
from tests.cli.test_surface import commands


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("-1", -1), ("2.0", 2), ("1e6", 1_000_000), ("9007199254740993", 2**53 + 1)],
)
def test_whole_numbers_are_read_exactly(text, number):
    assert whole._whole(text) == number


@pytest.mark.parametrize("text", ["2.5", "-0.1", "nan", "inf", "two", "", "1e-3"])
def test_others_are_refused(text):
    with pytest.raises(ValueError, match="is no whole number"):
        whole._whole(text)


def test_several_numbers_as_well(capsys):
    assert app.main(["generate", "calibrate", "--depth", "3", "4.5"]) == 2
    assert "'4.5' is no whole number" in capsys.readouterr().err


def test_every_count_of_every_command_is_read_so():
    """One that were not would round: cyclopts alone makes 2 of 2.5."""
    readers, seen = {whole.whole, whole.wholes}, 0
    for _, command in commands(app.build()):
        if command.default_command is None:
            continue
        for argument in command.assemble_argument_collection():
            if argument.hint in (int, list[int]):
                assert argument.parameter.converter in readers, argument.name
                seen += 1
    assert seen > 20
