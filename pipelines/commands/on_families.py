"""The command that drafts a model family."""

from pathlib import Path
from typing import Annotated

import typer

from dmquant.errors import UserError
from dmquant.pipelines.commands.command import command
from dmquant.pipelines.commands.options import Model


@command(
    "dmquant draft-family ./my-pipeline --out my_family.py",
    "dmquant run ./my-pipeline --family my_family.py    (once it is checked)",
)
def draft_family(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The Python file to write. Default: the terminal.", show_default=False),
    ] = None,
) -> None:
    """Draft a model family for MODEL, whose backbone none knows: blocks, layers to keep, guidance; no weights are read.

    The draft says what has to be checked. `--family FILE` of the other commands takes it.
    """
    from dmquant.host.files import write_text
    from dmquant.pipelines.models.drafting import draft, unknown_parts

    text = draft(*unknown_parts(model))
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise UserError(f"{out} is there already: choose another file with --out")
    write_text(out, text)
    typer.echo(f"family: {out}; check it, then: dmquant run {model} --family {out}")
