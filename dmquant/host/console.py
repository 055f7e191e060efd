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

PLAIN_WIDTH = 120  # columns where there is no terminal to ask


class Console:
    """Results go to standard output, bars to standard error; bars show only on a terminal."""

    def __init__(self) -> None:
        self._out = rich.console.Console(highlight=False, soft_wrap=True, width=_width())
        self._bars = rich.console.Console(stderr=True, highlight=False)
        self._log: Path | None = None

    def say(self, line: str) -> None:
        """Print one line, and log it."""
        self._out.print(line, markup=False)
        self.note(line)

    def note(self, line: str) -> None:
        """Log one line without printing it."""
        if self._log is None:
            return
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        with self._log.open("a", encoding="utf-8") as log:
            log.writelines(f"{now} {part}\n" for part in line.splitlines())

    def show(self, table: Table) -> None:
        """Print a table, and log it as plain text."""
        self._out.print(table, soft_wrap=False)
        plain = rich.console.Console(file=StringIO(), width=PLAIN_WIDTH)
        plain.print(table)
        self.note(plain.file.getvalue().rstrip())

    @contextlib.contextmanager
    def logging_to(self, log: Path) -> Iterator[None]:
        """Log to a file until the block ends, what stopped it included; only the main process does."""
        self._log = log if processes.current().is_main else None
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.note(f"stopped: {type(error).__name__}: {error}")
            raise
        finally:
            self._log = None

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator["Bar"]:
        """A bar with the time to go, shown while the block runs."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._bars, transient=True, disable=not self._bars.is_terminal) as progress:
            yield Bar(progress, progress.add_task(title, total=None, speed=""))


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
