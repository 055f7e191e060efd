"""A dmquant command in a process of its own, forked where all imports are done, with a fault in it if need be."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.forked import started

PATIENCE = 180  # seconds for a command that takes two on an idle machine
Fault = Callable[[], None]
"""What a process does before its command; picklable."""


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit status (the negative of the signal that ended it), output, and seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def hung(self) -> bool:
        return self.seconds >= PATIENCE

    def unlike_a_refusal(self) -> list[str]:
        """What is wrong with it as a refusal, which is one line that says what to do, and exit status 1 or 2."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        wrong = []
        if self.code not in (1, 2):
            wrong.append(f"exit status {self.code}")
        if "Traceback" in self.err or "rerun with --debug" in self.err:
            wrong.append("an error that nobody foresaw")
        if sum(line.startswith("error:") for line in lines) != 1:
            wrong.append(f"{len(lines)} lines of error")
        return [f"{one}: {' / '.join(lines[-3:])}" for one in wrong]


def dmquant(
    arguments: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    fault: Fault | None = None,
    kill_after: float | None = None,
) -> Said:
    """Run a command in `folder`, SIGKILLed `kill_after` seconds after it began if it still runs."""
    with TemporaryDirectory(prefix="faults-") as said:
        out, err, ready = (Path(said, name) for name in ("out", "err", "ready"))
        process = started(_command, arguments, str(folder), environment, str(out), str(err), str(ready), fault)
        while not ready.exists() and process.exitcode is None:
            process.join(0.005)
        began = time.monotonic()
        process.join(PATIENCE if kill_after is None else kill_after)
        if process.exitcode is None:
            process.kill()
            process.join()
        seconds = time.monotonic() - began
        texts = [path.read_text("utf-8", "replace") if path.exists() else "" for path in (out, err)]
        return Said(process.exitcode, *texts, seconds)


def _command(
    arguments: Sequence[str],
    folder: str,
    environment: dict[str, str],
    out: str,
    err: str,
    ready: str,
    fault: Fault | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(folder)
    sys.argv = ["dmquant", *arguments]
    from dmquant.pipelines.commands import app
    from tests.faults import loaded  # noqa: F401  (imports what a command imports while it runs)

    Path(ready).touch()
    if fault is not None:
        fault()
    app.main()
