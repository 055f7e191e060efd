"""Formats: finite sets of values of at most 8 bits, and the arithmetic between real numbers, values and codes."""

import re
from collections.abc import Callable
from functools import cache

from dmquant.errors import UsageError, unknown
from dmquant.formats.floating import FloatFormat
from dmquant.formats.format import Format
from dmquant.formats.integer import IntFormat
from dmquant.formats.lookup import GAUSSIAN, IQ4_NL, NF4, NL3, NL4, LookupFormat

SHORT_NAMES = {"fp4": "fp4_e2m1", "fp6": "fp6_e2m3", "fp8": "fp8_e4m3"}

_FLOAT_NAMES = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e3m4")
_TABLES = (NF4, NL4, NL3, IQ4_NL, GAUSSIAN)


def known_formats() -> list[str]:
    """Names worth listing; `get_format` also knows every other fpN_eXmY with N = 1 + X + Y <= 8."""
    return [*_FLOAT_NAMES, *(f"int{bits}" for bits in range(2, 9)), *(fmt.name for fmt in _TABLES)]


def get_format(name: str) -> Format:
    """The format called `name`, in either case: "fp4", "fp6_e3m2", "int8", "lut4"; always the same object.

    Raises UsageError for a name that is unknown, or whose bits do not add up.
    """
    lower = name.lower()
    return _parse(SHORT_NAMES.get(lower, lower))


@cache
def _parse(name: str) -> Format:
    for pattern, make in _PATTERNS.items():
        if match := re.fullmatch(pattern, name):
            return make(*map(int, match.groups()))
    raise unknown("format", name, [*SHORT_NAMES, *known_formats()], "`dmquant formats` lists them")


def _make_float(bits: int, exponent: int, mantissa: int) -> FloatFormat:
    if bits != 1 + exponent + mantissa:
        raise UsageError(
            f"format 'fp{bits}_e{exponent}m{mantissa}' does not add up: "
            f"1 sign + {exponent} exponent + {mantissa} mantissa bits are {1 + exponent + mantissa}, not {bits}"
        )
    return FloatFormat(exponent, mantissa)


_PATTERNS: dict[str, Callable[..., Format]] = {
    r"fp(\d{1,3})_e(\d{1,3})m(\d{1,3})": _make_float,
    r"int(\d{1,3})": IntFormat,
    **{fmt.name: lambda fmt=fmt: fmt for fmt in _TABLES},
}
