"""Text of others, which is data: without what a terminal, a page or a spreadsheet would act on, and without paths."""

import json
import ntpath
import os
import re
import shlex
from pathlib import Path
from typing import Any

CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""Characters that are not seen but do something, for a class of a regular expression; tab and line feed are none."""
_CONTROL = re.compile(f"[{CONTROLS}]")
_ESCAPED = re.compile(rf"\\(?=u[0-9a-f]{{4}})|[{CONTROLS}]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_STEP = r"""[^\s\\/,;:'"`()<>|=]+"""  # a part of a path
_PATH = re.compile(
    rf"(?<![\w/.~$-])(?!(?<=:)//)(?:~[\w.-]*|\$\w+|\$\{{\w+\}}|file:|\.{{1,2}})?(?:/+{_STEP})+/*"
    rf"|(?<!\w)(?:[A-Za-z]:|\\)(?:[\\/]{_STEP})+[\\/]*"
)
_PARTS = re.compile(r"([=,;]|:(?![\\/])|(?<=[^=,;:]{2}):)")  # of a word of a command; of `C:\\x` the colon is none
SHORTEST_HOME = 3
ON_HUB = "hf-hub:"
MOST = 2000  # characters of a message


def visible(text: str) -> str:
    """`text` on one line, its control characters and direction marks as escapes: an ESC is shown as \\u001b."""
    return _CONTROL.sub(_as_escape, " ".join(text.split("\n")).replace("\t", " "))


def replaced(text: str) -> str:
    """`text` of the same width, with question marks in place of its control characters; lines and tabs stay."""
    return _CONTROL.sub("?", text)


def escaped(text: str) -> str:
    """`text` in which control characters are escapes, to be stored; lines and tabs stay. `unescaped` undoes it."""
    return _ESCAPED.sub(_as_escape, text)


def unescaped(text: str) -> str:
    """The inverse of `escaped`."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)


def bounded(text: str, most: int = MOST) -> str:
    """`text`, of which the middle is left out where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def json_text(value: Any, **options: Any) -> str:
    """A value as JSON in readable Unicode, control characters as escapes."""
    return _CONTROL.sub(_as_escape, json.dumps(value, ensure_ascii=False, allow_nan=False, **options))


def yaml_text(value: Any, **options: Any) -> str:
    """A value as YAML in the order of its keys, in readable Unicode unless that would hold control characters."""
    import yaml  # here, so that `dmquant --help` does without

    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    return yaml.safe_dump(value, sort_keys=False, **options) if _CONTROL.search(text) else text


def file_name(path: str) -> str:
    """The last part of a path of any system; `~` for the home folder, whose name is a person's."""
    bare = path.rstrip("\\/")
    if os.path.normpath(os.path.expanduser(bare or path)) == _home():
        return "~"
    name = ntpath.basename(bare)
    return "~" if name.startswith(("~", "$")) else name or "."


def without_folders(text: str) -> str:
    """A sentence in which every absolute path, and every path from home, is the name of its file."""
    home = _home()
    text = text if home is None else re.sub(rf"(?<![\w/]){re.escape(home)}(?![\w.-])", "~", text)
    return _PATH.sub(lambda match: file_name(match[0]), text)


def command_without_folders(command: str, keep: str = "") -> str:
    """A command line in which every path is the name of its file; `keep`, the id of a model on the Hub, is no path."""
    try:
        words = shlex.split(command)
    except ValueError:
        return without_folders(command)
    return shlex.join(word if word == keep else _without_folders(word) for word in words)


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if value.startswith(ON_HUB):
        return word
    parts = _PARTS.split(value)
    return option + equals + "".join(file_name(part) if re.search(r"[\\/]|^[~$]", part) else part for part in parts)


def _home() -> str | None:
    try:
        home = str(Path.home())
    except RuntimeError:
        return None
    return home if len(home) >= SHORTEST_HOME else None


def _as_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
