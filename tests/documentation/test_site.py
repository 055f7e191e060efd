"""mkdocs.yml: every page of docs/ has its place in the site. Links and anchors are checked by `make docs`."""

import re

import yaml

import dmquant
from tests.documentation.pages import ROOT


def pages_of(nav):
    for entry in nav:
        for one in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of(one) if isinstance(one, list) else [one]


def test_every_page_stands_in_the_navigation_once():
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def test_the_interface_is_all_of_it():
    """Under the module in which each name stands, where `make docs` looks for its docstring."""
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"{home}.{name}" for name, home in dmquant._HOME.items()} <= set(shown)
