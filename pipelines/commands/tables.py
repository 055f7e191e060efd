"""Tables on the screen."""

from rich.table import Table


def table(*headers: str) -> Table:
    """An empty table of columns that wrap."""
    made = Table()
    for header in headers:
        made.add_column(header, overflow="fold")
    return made
