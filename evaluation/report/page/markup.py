"""Pieces of HTML. Cells and contents are HTML already; `escape` what comes from outside."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from dmquant.host.text import json_text, visible


def escape(text: str) -> str:
    """`text` on one line as HTML shows it, in which nothing is markup; control characters are visible."""
    return html.escape(visible(text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of rows whose cells are whole <td> or <th> elements, or "" without rows; header texts get escaped."""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in header)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def text_row(row: Iterable[Any], cell: str = "<td>{}</td>") -> list[str]:
    """A row of texts: the first is its heading, the others go into `cell`."""
    name, *values = row
    return [f"<th scope=row>{escape(str(name))}</th>", *(cell.format(escape(str(value))) for value in values)]


def json_script(name: str, data: Any) -> str:
    """Data for the page's script, which nothing in it can end early."""
    text = json_text(data, separators=(",", ":"))
    for character, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escaped)
    return f'<script type="application/json" id="{name}">{text}</script>'
