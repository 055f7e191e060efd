"""The `dmquant` app, and how a function becomes one of its commands."""

import functools
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from dmquant.errors import UserError
from dmquant.pipelines.commands.help import Command, Group

STOPPED = 130  # what a shell expects of a program ended by Ctrl-C; a batch system's SIGTERM is taken as one
DEBUG = "--debug"  # not an option of typer's, which takes one before the subcommand alone and imports pydantic for it

app = typer.Typer(
    name="dmquant",
    help="Quantize a text-to-image diffusion pipeline to FP4, FP6 or FP8, see what it cost, and ship the result.",
    epilog="Start here:       dmquant run emoji-pixart --w fp4 --a fp6\n"
    "What is at hand:  dmquant models,  dmquant formats,  dmquant recipes,  dmquant doctor",
    no_args_is_help=True,
    add_completion=False,
    cls=Group,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a subcommand whose errors end as one line and an exit code; `examples` close its help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                _fail("stopped; run the same command to resume", STOPPED)
            except UserError as error:
                _fail(f"error: {error}", error.exit_code)
            except Exception as error:
                message = " ".join(str(error).split())
                _fail(f"error: {type(error).__name__}: {message} (rerun with --debug for the traceback)", 1)

        epilog = "\n  ".join(["Examples:", *examples])
        return app.command(cls=Command, epilog=epilog)(guarded)

    return register


def typed() -> str:
    """The command as one would type it again."""
    return shlex.join(["dmquant", *(argument for argument in sys.argv[1:] if argument != DEBUG)])


def _fail(message: str, exit_code: int) -> None:
    if DEBUG in sys.argv:
        traceback.print_exc()
    print(message, file=sys.stderr)
    raise typer.Exit(exit_code)
