"""Numbers with units, for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.host.units import BYTES, about_text, size_text, time_text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (4_310, "4.31 kB"), (16_000_000, "16.0 MB"), (2_500_000_000, "2.50 GB")]
)
def test_sizes_are_in_decimal_units(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2 s"), (185, "3 min 5 s"), (7620, "2 h 7 min")])
def test_times_are_readable(seconds, text):
    assert time_text(seconds) == text


def test_a_size_that_is_known_roughly_or_not_at_all_says_so():
    assert [about_text(size) for size in (None, 15_600_000, 4_300_000_000)] == [
        "size unknown",
        "about 15.6 MB",
        "about 4.30 GB",
    ]


@given(st.integers(0, 10**15))
def test_a_size_that_is_rounded_up_is_never_too_small(count):
    number, unit = size_text(count, round_up=True).split()
    assert count <= round(float(number) * 1000 ** BYTES.index(unit)) <= 1.011 * count + 1
