"""Numbers with units, for people."""

import math

BYTES = ("B", "kB", "MB", "GB", "TB")


def size_text(count: int, round_up: bool = False) -> str:
    """`count` bytes in decimal units, three significant digits or so: "12.3 MB"; never less than it with `round_up`."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(BYTES) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 else 2 if value < 10 or BYTES[unit] == "TB" else 1
    if round_up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {BYTES[unit]}"


def about_text(count: int | None) -> str:
    """A size that is known roughly or not at all: "about 12.3 MB", "size unknown"."""
    return "size unknown" if count is None else f"about {size_text(count)}"


def time_text(seconds: float) -> str:
    """A duration: "4.2 s", "3 min 5 s" or "2 h 7 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
