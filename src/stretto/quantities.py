"""Quantities with units, as people write them in files: "139 GiB", "12 GB/s", "3 us".

Inside the library they are plain numbers in bytes, seconds, FLOP, bytes per second, FLOP per
second. Prefixes k M G T P are powers of 1000, Ki Mi Gi Ti of 1024, n u m below one.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from functools import partial
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_POWERS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_SCALES = {
    **{prefix: float(f"1e{power}") for prefix, power in _POWERS.items()},
    **{prefix + "i": 1024.0**power for power, prefix in enumerate("KMGT", start=1)},
}
_TEXT = re.compile(r"\s*([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)\s*([numkKMGTP]?i?)([A-Za-z].*?)\s*")
_SMALL = ("n", "u", "m", "")
_LARGE = ("", "k", "M", "G", "T", "P")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti")


def parse(unit: str, value: object) -> float:
    """A number of `unit` from "<number> <prefix><unit>"; a plain number is taken as it is.

    Raises ValueError naming the units that are understood, also for negative or infinite values.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        match = _TEXT.fullmatch(str(value))
        known = _SMALL if unit == "s" else (*_LARGE, *_BINARY)
        if not match or match[3] != unit or match[2] not in known:
            raise ValueError(f"{value!r} is no quantity; write number and unit, as {_like(unit)}")
        number = _scaled(match[1], match[2])
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} must be finite and not negative")
    return number


def render(unit: str, prefixes: tuple[str, ...], value: float) -> str:
    """The text of a value that `parse` reads back to the same number, short where it can be."""
    fitting = [p for p in prefixes if value >= _SCALES[p]] or [prefixes[0]]
    prefix = fitting[-1] if value else ""
    if prefix in _POWERS:
        # Decimal, so that 1.476e-4 s is 147.6 us and not its neighbour among the floats.
        text = f"{Decimal(repr(value)).scaleb(-_POWERS[prefix]).normalize():f}"
    else:
        text = f"{value / _SCALES[prefix]:.6g}"
    written = f"{text} {prefix}{unit}"
    return written if parse(unit, written) == value else f"{value!r} {unit}"


def _scaled(number: str, prefix: str) -> float:
    if prefix in _POWERS:
        return float(Decimal(number).scaleb(_POWERS[prefix]))
    return float(number) * _SCALES[prefix]


def short(unit: str, value: float) -> str:
    """A value for people, four digits, by the prefixes customary for the unit."""
    prefixes = _SMALL if unit == "s" else _LARGE
    fitting = [p for p in prefixes if value >= _SCALES[p]] or [prefixes[0]]
    prefix = fitting[-1] if value else ""
    return f"{value / _SCALES[prefix]:.4g} {prefix}{unit}"


def _like(unit: str) -> str:
    example = {"B": "139 GiB", "B/s": "12 GB/s", "s": "3 us", "FLOP/s": "790 TFLOP/s"}
    return repr(example.get(unit, f"12 T{unit}"))


def _quantity(unit: str, prefixes: tuple[str, ...]) -> tuple[BeforeValidator, PlainSerializer]:
    return BeforeValidator(partial(parse, unit)), PlainSerializer(partial(render, unit, prefixes))


def _whole_bytes(value: object) -> int:
    number = parse("B", value)
    # "11.8 GiB" is meant to the digit that it shows; "1.5 B" is a mistake.
    if number < 1000 and number != int(number):
        raise ValueError(f"{value!r} is {number:g} bytes, which is not a whole number")
    return round(number)


#: A whole number of bytes of a device's memory, written in GiB.
Memory = Annotated[
    int, BeforeValidator(_whole_bytes), PlainSerializer(partial(render, "B", _BINARY))
]
#: A whole number of bytes of a message, written in MB.
Bytes = Annotated[int, BeforeValidator(_whole_bytes), PlainSerializer(partial(render, "B", _LARGE))]
Seconds = Annotated[float, *_quantity("s", _SMALL)]
Rate = Annotated[float, *_quantity("B/s", _LARGE)]
Flops = Annotated[float, *_quantity("FLOP", _LARGE)]
FlopRate = Annotated[float, *_quantity("FLOP/s", _LARGE)]
