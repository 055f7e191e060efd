"""The `dmquant` command. Each subcommand is a few lines over `dmquant.pipelines`.

Nothing heavy is imported at the top: torch and diffusers are imported inside the commands, so that `--help` is instant.
"""

import errno
import os
import signal
import sys

from dmquant.host import streams
from dmquant.pipelines.commands import (  # noqa: F401  (which register their commands)
    on_environment,
    on_families,
    on_models,
    on_results,
    on_tuning,
)
from dmquant.pipelines.commands.command import DEBUG, app

PIPE_CLOSED = 141  # what a shell expects of a program whose reader has gone


def main() -> None:
    """Entry point; lets `--debug` stand anywhere on the command line."""
    streams.install()
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # half-written files are removed on the way out
    try:
        app(arguments, prog_name="dmquant")
    except SystemExit as end:
        raise SystemExit(end.code or _exit_code_of_output()) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code_of_output() -> int:
    """0 where all could be printed; else why not is said, except of a reader that has gone (`dmquant ... | head`)."""
    failure = streams.output_failure()
    if failure is None:
        return 0
    if failure.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
        return PIPE_CLOSED
    print(
        f"error: standard output cannot be written: {os.strerror(failure.errno)}; what the command makes is made",
        file=sys.stderr,
    )
    return 1
