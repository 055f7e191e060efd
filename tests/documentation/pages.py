"""What the pages of README.md and docs/ hold that can be run: blocks of Python, and commands."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}

_FENCE = re.compile(r"^ *```(\w*)")
_NOT_RUN = re.compile(r"^ *<!-- not run: (.+) -->$")
_INLINE = re.compile(r"(?<!`)`((?:dmquant|python|make) [^`]+)`(?!`)")
_COMMAND = re.compile(r"^(dmquant|python|make) ")


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, its language, its text, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None


@dataclass(frozen=True)
class Command:
    """A command as a page has it: where, and its words."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, top down."""
    found, lines = [], PAGES[page].read_text(encoding="utf-8").splitlines()
    start = None
    for at, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language = at, fence[1]
            reason = _NOT_RUN.match(lines[at - 1]) if at else None
        elif fence:
            found.append(Block(page, start + 2, language, "\n".join(lines[start + 1 : at]), reason and reason[1]))
            start = None
    assert start is None, f"{page}:{start + 1} begins a block that does not end"
    return found


def commands(page: str) -> list[Command]:
    """Commands of blocks, fenced or indented, and those with arguments in running text."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = []
    joined = re.sub(
        r" *\\\n *", lambda match: " " + "\0" * match[0].count("\n"), text
    )  # a line that goes on in the next
    line_number, fenced = 1, None
    for line in joined.split("\n"):
        fence = _FENCE.match(line)
        if fence:
            fenced = fence[1] if fenced is None else None
        elif fenced in ("", "sh", "bash") or (fenced is None and line.startswith("    ")):
            written = line.replace("\0", "").strip()
            for one in written.split(" && ") if _COMMAND.match(written) else ():
                found.append(Command(page, line_number, tuple(_words(re.sub(r"^python3[.]\d+ ", "python ", one)))))
        line_number += 1 + line.count("\0")
    prose = re.sub(r"^ *```.*?^ *```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for match in _INLINE.finditer(prose):
        line = prose.count("\n", 0, match.start()) + 1
        found.append(Command(page, line, tuple(_words(" ".join(match[1].split())))))
    return found


def _words(written: str) -> list[str]:
    """Words of a shell's line, without its comment and what follows a pipe."""
    words = shlex.split(written, comments=True)
    return words[: words.index("|")] if "|" in words else words
