"""Which room imports which: arrows run down, in no circle; the core stands on torch, pydantic, yaml and numpy alone."""

import importlib.util
import re
import statistics
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "draw_architecture.py"
CORE_STANDS_ON = {"torch", "pydantic", "yaml", "numpy"}
CORE_LINES, FILE_LINES, MEDIAN_LINES = 4200, 350, 110


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_architecture", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modules(drawing):
    return drawing.source_files()


def core(drawing, modules):
    return {name: path for name, path in modules.items() if drawing.room_of(name) == "dmquant"}


def test_a_room_imports_only_rooms_below_it(drawing, modules):
    order = list(drawing.ROOMS)
    up = {
        pair: places for pair, places in drawing.arrows(modules).items() if order.index(pair[0]) < order.index(pair[1])
    }
    assert not up


def test_no_modules_import_each_other_in_a_circle(drawing, modules):
    below = {
        name: {other for other in drawing.imports(path, modules) if other in modules and other not in (name, "dmquant")}
        for name, path in modules.items()
    }
    assert len(list(TopologicalSorter(below).static_order())) >= len(modules)


def test_the_core_imports_few_packages(drawing, modules):
    outside = {
        name: {other for other in drawing.imports(path, modules) if other not in modules}
        - CORE_STANDS_ON
        - sys.stdlib_module_names
        - {"dmquant"}
        for name, path in core(drawing, modules).items()
    }
    assert not {name: packages for name, packages in outside.items() if packages}


def test_of_other_rooms_the_core_names_only_what_its_doors_open(drawing, modules):
    """dmquant/__init__.py registers with diffusers, dmquant/__main__.py is the command."""
    named = {
        (name, other)
        for name, path in core(drawing, modules).items()
        for other in drawing.imports(path, modules)
        if other in modules and drawing.room_of(other) != "dmquant"
    }
    assert {name for name, _ in named} <= {"dmquant", "dmquant.__main__"}


def test_files_are_small(drawing, modules):
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    assert not {name: count for name, count in lines.items() if count > FILE_LINES}
    assert statistics.median(lines.values()) < MEDIAN_LINES
    assert sum(lines[name] for name in core(drawing, modules)) <= CORE_LINES


def test_the_drawing_shows_the_imports_as_they_are(drawing, modules):
    drawn = drawing.draw(drawing.reduced(drawing.arrows(modules)))
    assert drawn == drawing.DRAWING.read_text(encoding="utf-8"), "run: python tools/draw_architecture.py"
    places = re.findall(r'<rect x="([^"]+)" y="([^"]+)"', drawn)
    assert len(set(places)) == len(places) >= len(drawing.ROOMS), "two rooms lie on one another: change a column"


def test_every_package_is_installed(modules):
    """`pip install` takes the packages that pyproject.toml lists, and no other; tests run from the checkout."""
    text = TOOL.parents[1].joinpath("pyproject.toml").read_text("utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    assert packages == {*re.findall(r'"([\w.]+)"', listed[1])}
