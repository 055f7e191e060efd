"""Processes that start with all that is imported already there, forked from one process in which tests share it.

Importing takes seconds, and most tests of several processes, or of one that is killed, do a small thing in each.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Forked:
    """Like subprocess.Popen of `python *arguments`, where these are `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`."""

    def __init__(self, arguments: list, environment: dict[str, str] | None = None):
        self._said = tempfile.TemporaryDirectory(prefix="forked")
        out, err = (Path(self._said.name, name) for name in ("out", "err"))
        values = dict(os.environ) | (environment or {})
        self._process = started(_execute, [str(one) for one in arguments], values, out, err)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit status; of one that a signal ended, the negative of the signal."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"a process did not end in {timeout} s and said {self._read('err')}")
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it wrote to standard output and standard error before it ended."""
        self.wait(timeout)
        return self._read("out"), self._read("err")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def _read(self, name: str) -> str:
        path = Path(self._said.name, name)
        return path.read_text() if path.exists() else ""


def started(function, *arguments):
    """A process that calls a function of a module."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.imported"])
    process = server.Process(target=function, args=arguments)
    with _importable():
        process.start()
    return process


def wait_until(condition, process: Forked, patience: float):
    """What `condition` gives as soon as that is something, while `process` is alive."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert process.poll() is None, process.communicate(patience)
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def _importable():
    """The server is started with the first process, and finds the tests as they were found here."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _execute(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may have it ignored
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<script>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
