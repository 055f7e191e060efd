"""The rooms of evaluation stand on one another: images below, then networks, metrics and reports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "evaluation"
ROOMS = ("", "networks", "metrics", "report")  # from below; the first is evaluation's own files


def imported(path):
    """Names below dmquant.evaluation that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("dmquant.evaluation."):
            below = node.module.removeprefix("dmquant.evaluation").lstrip(".")
            yield from [below] if below else [alias.name for alias in node.names]


def test_a_room_imports_only_itself_and_those_below():
    up = [
        (str(path.relative_to(ROOT)), name)
        for place, room in enumerate(ROOMS)
        for path in ((ROOT / room).rglob("*.py") if room else ROOT.glob("*.py"))
        for name in imported(path)
        if name.partition(".")[0] in ROOMS[place + 1 :]
    ]
    assert not up
