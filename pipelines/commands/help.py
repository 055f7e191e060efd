"""Help texts in plain text, grouped as the options say. rich would take longer to import than everything else here."""

import contextlib
from collections.abc import Iterator
from typing import Any

from typer import Context, Exit, echo
from typer.core import TyperCommand, TyperGroup

from dmquant.host.text import bounded, visible


class _PlainHelp:
    """Help of the commands, and of the group that holds them."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Answers a leading --help itself: typer would import pydantic to find out that the flag is set."""
        if args and args[0] in self.get_help_option_names(ctx):
            echo(ctx.get_help())
            raise Exit
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Context, formatter) -> None:
        """Options stand under the headings that they name as their `rich_help_panel`."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                heading = getattr(parameter, "rich_help_panel", None) or usual
                sections.setdefault(heading, []).append((record[0], _filled_in(record[1])))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Context, formatter) -> None:
        """Its lines are commands to copy, which stay whole."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(self.epilog + "\n")


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Print an error of the parser, which would take four lines with its usage; help that stands for one stays."""
    try:
        yield
    except Exception as error:
        context, message = getattr(error, "ctx", None), getattr(error, "format_message", None)
        if message is None or context is None or type(error).__name__ == "NoArgsIsHelpError":
            raise
        said = bounded(message().rstrip(".").replace("Invalid value for ", ""))
        echo(visible(f"error: {said}: see {context.command_path} --help"), err=True)
        raise Exit(error.exit_code) from None


def _filled_in(text: str) -> str:
    """A help text with the metrics that there are; they are looked for only where a text names them."""
    if "{metrics}" not in text:
        return text
    from dmquant.evaluation.metrics.registry import defaults_for_help, list_for_help

    return text.replace("{metrics}", list_for_help()).replace("{default_metrics}", defaults_for_help())


class Command(_PlainHelp, TyperCommand):
    """A command of the group."""


class Group(_PlainHelp, TyperGroup):
    """The command that holds the others; what it cannot make sense of is one line, like every other error."""

    def make_context(self, *args: Any, **kwargs: Any) -> Context:
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Context) -> Any:
        with _in_one_line():
            return super().invoke(ctx)

    def get_params(self, ctx: Context) -> list:
        """None to parse before a command's name: a flag that is not set is what typer imports pydantic for, too."""
        return []

    def format_options(self, ctx: Context, formatter) -> None:
        debug = ("--debug", "Show the traceback of an error; may stand anywhere on the line.")
        with formatter.section("Options"):
            formatter.write_dl([debug, self.get_help_option(ctx).get_help_record(ctx)])
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(each.name, each.help.partition("\n\n")[0]) for each in commands])
