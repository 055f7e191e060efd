"""Standard output and error that end no command: what they cannot show is replaced, that they fail is said at its end.

Hours of work do not depend on whether somebody reads what is printed: where a stream is closed or cannot be written,
the rest of it is dropped.
"""

import codecs
import contextlib
import io
import os
import sys

INSTEAD = {"↑": "^", "↓": "v", "–": "-", "…": "...", "×": "x", "★": "*", "“": '"', "”": '"', "’": "'"}
HANDLER = "dmquant-instead"
STANDARD = ("stdin", "stdout", "stderr")


class Stream(io.TextIOWrapper):
    """A standard stream; `failure` is the first error in writing it, after which it leads nowhere."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._going_on():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            super().flush()

    @contextlib.contextmanager
    def _going_on(self):
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what is buffered still goes there
            os.close(nowhere)


def install() -> None:
    """Make Stream of the standard output and error of this process; those that are closed lead nowhere."""
    codecs.register_error(HANDLER, _instead)
    _fill_closed()
    for number, name in enumerate(STANDARD):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
        elif number and type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            kept = {one: getattr(stream, one) for one in ("encoding", "line_buffering", "write_through")}
            setattr(sys, name, Stream(stream.detach(), errors=HANDLER, **kept))
            setattr(sys, f"__{name}__", getattr(sys, name))


def output_failure() -> OSError | None:
    """Why standard output could not be written, once all is flushed; None where it was."""
    sys.stdout.flush()
    return getattr(sys.stdout, "failure", None)


def _fill_closed() -> None:
    """Have no file that is opened later take the number of a standard stream that was closed."""
    number = os.open(os.devnull, os.O_RDWR)
    while number < len(STANDARD):
        os.set_inheritable(number, True)
        number = os.dup(number)
    os.close(number)


def _instead(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(INSTEAD.get(character, "?") for character in text), error.end
