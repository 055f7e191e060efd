"""The commands that change this Python environment: register, unregister."""

import typer

from dmquant.pipelines.commands.command import command


@command("dmquant register")
def register() -> None:
    """Let every app of this Python environment load dmquant's folders without importing it.

    Writes a start-up line into the environment. It costs less than a millisecond when Python starts, imports nothing
    until diffusers or transformers look for a quantizer, and `dmquant unregister` takes it away.
    """
    from dmquant.pipelines.commands import startup

    typer.echo(f"written: {startup.register()}")
    typer.echo("apps of this environment load dmquant's folders without `import dmquant`; undo: dmquant unregister")


@command("dmquant unregister")
def unregister() -> None:
    """Take away what `dmquant register` wrote: apps have to `import dmquant` again."""
    from dmquant.pipelines.commands import startup

    gone = startup.unregister()
    typer.echo(f"removed: {gone}" if gone else "there is no start-up line in this environment")
