"""mkdocs.yml: every page of docs/ has its place in the site. Links and anchors are checked by `make docs`."""

import yaml

from tests.documentation.pages import ROOT


def pages_of(nav):
    for entry in nav:
        for one in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of(one) if isinstance(one, list) else [one]


def test_every_page_stands_in_the_navigation_once():
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
