"""Damage done to files: to their bytes, and to the values that JSON or YAML holds."""

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

PIECES = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\t",
        b"\x1b[31m",
        b"\xed\xa0\x80",
        b"\xe2\x80\xae",
        b"\xc2\x85",
    ),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"- ", b"#", b"|", b">", b"%", b"@", b"`", b";", b"=", b"\\"),
    *(b"&a ", b"*a ", b"<<: *a", b"!!python/object:os.system", b"!!binary ", b"? ", b"---\n", b"~", b"null", b"true"),
    *(b"NaN", b"-Infinity", b"1e999", b"0x", b"-1", b"1_0", b"0o7", b"9" * 500, b"1:30:00", b"2001-01-01", b"=1+1"),
)
NAMES = ("name", "version", "sha256", "weights", "match", "value", "shape", "dtype", "data_offsets", "__class__", "")


def values(drawn: random.Random) -> Any:
    """A value that a file may hold where another is expected."""
    plain = (None, True, False, 0, 1, -1, 2, 16000, 10**7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320)
    odd = (
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "0",
        "none",
        "../../x",
        "/",
        "\x00",
        "a\nb",
        "=1+1",
        "é" * 300,
    )
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: drawn.choice(plain),
        lambda: drawn.choice(odd),
        lambda: "x" * 10 ** drawn.randrange(6),
        list,
        dict,
        lambda: [drawn.choice(plain)] * drawn.choice((1, 2, 1000)),
        lambda: {drawn.choice(NAMES): drawn.choice(plain + odd)},
        lambda: _nested(drawn.choice((3, 50, 400))),
        lambda: drawn.randrange(-(10**6), 10**6),
    )
    return drawn.choice(kinds)()


def damaged_bytes(data: bytes, drawn: random.Random) -> bytes:
    """Bytes with one to three places flipped, cut out, repeated, replaced, or with something put in."""
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        at = drawn.randrange(len(data) + 1)
        length = drawn.choice((1, 1, 2, 8, 64, 1024))
        kind = drawn.randrange(8)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << drawn.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + data[at : at + length] * drawn.choice((2, 3, 100)) + data[at + length :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + drawn.randbytes(length) + data[at + length :]
        elif kind == 5:
            lines = data.split(b"\n")
            drawn.shuffle(lines)
            data = b"\n".join(lines)
        else:
            data = data[:at] + drawn.choice(PIECES) + data[at + drawn.choice((0, 0, length)) :]
    return data


def damaged_value(value: Any, drawn: random.Random) -> Any:
    """A copy of what JSON holds, in which one to three values or keys are missing, renamed, swapped or others."""
    value = json.loads(json.dumps(value))
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return values(drawn)
        holder, key = drawn.choice(places)
        kind = drawn.randrange(7)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[drawn.choice((*NAMES, str(key).upper(), f"{key} "))] = holder.pop(key)
        elif kind == 2:
            other, at = drawn.choice(places)
            with contextlib.suppress(RecursionError):
                holder[key] = json.loads(json.dumps(other[at]))
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * drawn.choice((-1, 2, 10, 1000)) + drawn.choice((-1, 0, 1))
        elif kind == 4 and isinstance(holder[key], str) and holder[key]:
            at = drawn.randrange(len(holder[key]))
            holder[key] = (
                holder[key][:at] + drawn.choice(("", "\n", "\x00", "9", "\ufffd", "*")) + holder[key][at + 1 :]
            )
        else:
            holder[key] = values(drawn)
    return value


def _places(value: Any, depth: int = 0):
    """Every dictionary or list with each of its keys; deeper ones as likely as others."""
    if depth > 30:
        return
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner, depth + 1)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value
