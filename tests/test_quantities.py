"""Quantities: text to numbers and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.quantities import parse, render, short


@pytest.mark.parametrize(
    ("unit", "text", "number"),
    [
        ("B", "139 GiB", 139 * 2**30),
        ("B/s", "12 GB/s", 12e9),
        ("s", "3 us", 3e-6),
        ("s", "2.83 s", 2.83),
        ("s", "1e-3ms", 1e-6),
        ("FLOP/s", "790 TFLOP/s", 790e12),
        ("FLOP", 5, 5.0),
    ],
)
def test_parses(unit, text, number):
    assert parse(unit, text) == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("B", "12 GB/s"),
        ("B", "12 KB"),
        ("B", "12 mB"),
        ("s", "3 min"),
        ("s", "3"),
        ("s", "-3 s"),
        ("s", float("nan")),
        ("s", float("inf")),
        ("s", True),
        ("s", ""),
        ("B/s", "fast"),
    ],
)
def test_refuses(unit, text):
    with pytest.raises(ValueError, match=r"is no quantity|must be finite"):
        parse(unit, text)


@given(st.floats(0, 1e30, allow_nan=False), st.sampled_from(["B", "B/s", "FLOP", "FLOP/s"]))
def test_what_is_written_reads_back_the_same(value, unit):
    for prefixes in (("", "k", "M", "G", "T", "P"), ("", "Ki", "Mi", "Gi", "Ti")):
        assert parse(unit, render(unit, prefixes, value)) == value


@given(st.floats(0, 1e12, allow_nan=False))
def test_seconds_read_back_the_same(value):
    assert parse("s", render("s", ("n", "u", "m", ""), value)) == value


def test_short_has_four_digits():
    assert short("s", 0.00123456) == "1.235 ms"
    assert short("B/s", 0) == "0 B/s"
