"""Terminal output of a run: lines, bars with a time to go, tables; and the same lines, with times, in a log."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path

import rich.console
import rich.segment
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dmquant.host import processes
from dmquant.host.text import bounded, replaced, visible, without_folders

PLAIN_WIDTH = 120  # columns where there is no terminal to ask
PLAIN = {"highlight": False, "markup": False, "emoji": False}


class Console:
    """Results go to standard output, bars to standard error; bars show only on a terminal.

    Names and prompts in what is printed are text: markup, emoji codes and control characters in them do nothing.
    """

    def __init__(self) -> None:
        self._out = rich.console.Console(soft_wrap=True, width=_width(), **PLAIN)
        self._bars = rich.console.Console(stderr=True, **PLAIN)
        self._log: Path | None = None

    def say(self, line: str) -> None:
        """Print one line, and log it."""
        line = visible(bounded(line))
        self._out.print(line)
        self.note(line)

    def note(self, text: str) -> None:
        """Log lines without printing them; a log gets shared, and so names files without the folders above them."""
        if self._log is None:
            return
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        with self._log.open("a", encoding="utf-8") as log:
            log.writelines(f"{now} {visible(without_folders(line))}\n" for line in text.split("\n"))

    def show(self, table: Table) -> None:
        """Print a table, and log it as plain text."""
        self._out.print(_Harmless(table), soft_wrap=False)
        plain = rich.console.Console(file=StringIO(), width=PLAIN_WIDTH, **PLAIN)
        plain.print(_Harmless(table))
        self.note(plain.file.getvalue().rstrip())

    @contextlib.contextmanager
    def logging_to(self, log: Path) -> Iterator[None]:
        """Log to a file until the block ends, what stopped it included; only the main process does."""
        self._log = log if processes.current().is_main else None
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.note(bounded(f"stopped: {type(error).__name__}: {error}"))
            raise
        finally:
            self._log = None

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator["Bar"]:
        """A bar with the time to go, shown while the block runs."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._bars, transient=True, disable=not self._bars.is_terminal) as progress:
            yield Bar(progress, progress.add_task(title, total=None, speed=""))


class _Harmless:
    """A table whose cells hold no control characters."""

    def __init__(self, table: Table):
        self._table = table

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions):
        for segment in console.render(self._table, options):
            yield segment if segment.control else rich.segment.Segment(replaced(segment.text), segment.style)


class Bar:
    """A bar on the screen; call it with how far the work is."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress = progress
        self._task = task

    def __call__(self, done: int, total: int, what: str | None = None, speed: str = "") -> None:
        named = {} if what is None else {"description": what}
        self._progress.update(self._task, completed=done, total=total, speed=speed, **named)


def _width() -> int | None:
    return None if sys.stdout.isatty() else PLAIN_WIDTH


def quiet_libraries() -> None:
    """Keep the libraries' warnings and bars out of a run: dmquant prints or raises the ones that matter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
