"""What a console prints and logs: names and prompts are text there, and a log can be shared."""

import re

from rich.table import Table

from dmquant.host.console import Console
from dmquant.host.text import CONTROLS

HOSTILE = "[bold]x[/bold] [/nothing] :smile: \x1b[31mred\x07 \u202egnp"


def test_markup_emoji_codes_and_control_characters_do_nothing(capsys, tmp_path):
    console, table = Console(), Table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    with console.logging_to(tmp_path / "log.txt"):
        console.say(HOSTILE + "\nnext")
        console.show(table)
    printed = capsys.readouterr().out
    for text in (printed, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert not re.search(f"[{CONTROLS}]", text)
        assert text.count(":smile:") == text.count("[bold]x[") == 3
    assert printed.splitlines()[0].endswith("[/nothing] :smile: \\u001b[31mred\\u0007 \\u202egnp next")


def test_a_log_names_files_without_their_folders_and_what_is_printed_with_them(capsys, tmp_path):
    console = Console()
    with console.logging_to(tmp_path / "log.txt"):
        console.say(f"report: {tmp_path}/run/report.html   of 3/4 images")
    assert f"{tmp_path}/run/report.html" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text().endswith(" report: report.html   of 3/4 images\n")


def test_a_line_of_megabytes_is_cut(capsys):
    Console().say("x" * 5_000_000)
    assert len(capsys.readouterr().out) < 2100
