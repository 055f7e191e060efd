"""The `dmquant` app, and how a function becomes one of its commands."""

import errno
import functools
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from dmquant.errors import UserError
from dmquant.host.text import bounded, visible
from dmquant.pipelines.commands.help import Command, Group

# The exit code is what a shell expects of a program ended by Ctrl-C; a batch system's SIGTERM is taken as one.
STOPPED = ("stopped; run the same command to resume", 130)
DEBUG = "--debug"  # not an option of typer's, which takes one before the subcommand alone and imports pydantic for it
REMEDIES = {
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.EROFS: "name one on a disk that can be written",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOENT: "look whether it is there, or name another",
    errno.ENOSPC: "make room on that disk and run the same command to resume",
    errno.EDQUOT: "make room on that disk and run the same command to resume",
    errno.EMFILE: "allow more open files with `ulimit -n`",
}
"""By the number of an operating system's error, how to get on."""
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # Python's and torch's

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
                _fail(*STOPPED)
            except Exception as error:
                _fail(*_message(error))

        epilog = "\n  ".join(["Examples:", *examples])
        return app.command(cls=Command, epilog=epilog)(guarded)

    return register


def typed() -> str:
    """The command as one would type it again."""
    return visible(shlex.join(["dmquant", *(argument for argument in sys.argv[1:] if argument != DEBUG)]))


def _message(error: Exception) -> tuple[str, int]:
    """The line that an error ends the command with, and the exit code."""
    if _was_interrupted(error):
        return STOPPED
    if isinstance(error, UserError):
        cause = error.__cause__
        ends_there = isinstance(cause, OSError) and cause.strerror and str(error).endswith(cause.strerror)
        return f"error: {error}{f'; {_remedy(cause)}' if ends_there else ''}", error.exit_code
    if isinstance(error, OSError) and error.strerror:
        file = error.filename if isinstance(error.filename, str) else type(error).__name__
        return f"error: {file}: {error.strerror}; {_remedy(error)}", 1
    message = " ".join(bounded(str(error)).split())
    if type(error).__name__ in OUT_OF_MEMORY or "can't allocate memory" in message:
        return (
            "error: there is not enough memory: take a smaller --batch-size, --height and --width, or --offload group",
            1,
        )
    return f"error: {type(error).__name__}: {message} (rerun with --debug for the traceback)", 1


def _remedy(error: OSError) -> str:
    return REMEDIES.get(error.errno, "look at it, or name another")


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a library that calls Python may put an exception of its own in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        if KeyboardInterrupt.__name__ in str(error) and not isinstance(error, UserError):
            return True
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(message: str, exit_code: int) -> NoReturn:
    if DEBUG in sys.argv:
        traceback.print_exc()
    print(visible(bounded(message)), file=sys.stderr)
    raise typer.Exit(exit_code)
