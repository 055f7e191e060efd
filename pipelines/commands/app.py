"""The `dmquant` command. Each subcommand is a few lines over `dmquant.pipelines`.

Nothing heavy is imported at the top: torch and diffusers are imported inside the commands, so that `--help` is instant.
"""

import signal
import sys

from dmquant.pipelines.commands import on_models, on_results  # noqa: F401  (which register their commands)
from dmquant.pipelines.commands.command import DEBUG, app


def main() -> None:
    """Entry point; lets `--debug` stand anywhere on the command line."""
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # half-written files are removed on the way out
    try:
        app(arguments, prog_name="dmquant")
    finally:
        signal.signal(signal.SIGTERM, before)
