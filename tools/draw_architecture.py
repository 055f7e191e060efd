"""Draw which room of the code imports which: docs/images/architecture.svg, from the import statements alone.

    python tools/draw_architecture.py

tests/test_architecture.py holds the same arrows against the order of ROOMS, and the drawing against the code.
"""

import ast
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "images" / "architecture.svg"
FOLDERS = ("calib", "pipelines", "evaluation", "configs")  # packages of dmquant that stand beside its folder
PUBLIC = "dmquant"  # dmquant/__init__.py and __main__.py: the doors, which lead to every room

ROOMS = {
    "dmquant": ("the core: formats, scales, grids, layers, recipes, transforms, kernels", 1.5),
    "dmquant/rounding": ("how codes are decided: to the nearest, learned, solved", 3),
    "dmquant/graphs": ("what graphs of autograd and torch.compile hold of a layer", 1.5),
    "dmquant/convert": ("the layers of a module swapped for quantized ones, as a recipe says", 2),
    "dmquant/operands": ("weights and inputs as small integers", 0),
    "dmquant/host": ("files, processes, memory, the terminal", 1),
    "dmquant/cpu": ("kernels: how a quantized layer multiplies on a CPU", 1),
    "dmquant/gpu": ("kernels: how it multiplies on a GPU", 0),
    "dmquant/diffusers": ("the quantizer, the families, how a pipeline is called and watched", 2),
    "dmquant/transformers": ("text encoders: the quantizer, and which layers they keep", 2),
    "dmquant/exchange": ("formats of other engines, written and read", 3),
    "calib/data": ("calls of the full-precision backbone, chosen and stored", 0),
    "calib/layers": ("what is fitted to the data of one layer", 0),
    "calib/objectives": ("what roundings are learned by", 1),
    "calib/blocks": ("the march from block to block", 0),
    "calib/whole": ("all layers at once, end to end", 0),
    "calib/tuning": ("a quantized backbone that learns from full precision", 1),
    "calib/choice": ("what a layer costs in each format, and the cheapest choice", 2),
    "evaluation": ("images, metrics, reports", 1),
    "pipelines/models": ("which models there are, and where", 2),
    "pipelines/prompts": ("lists of prompts", 3),
    "pipelines/runs": ("a run folder, and all that is done in it", 1.5),
    "pipelines": ("quantize_pipeline", 1),
    "pipelines/choice": ("what quantizing costs, layer by layer; formats for a target", 3),
    "pipelines/sweep": ("many runs: quality against cost", 2),
    "pipelines/commands": ("the command line", 2),
}
"""Every room with what it is for and its column in the drawing; a room imports only rooms that stand before it."""


def source_files() -> dict[str, Path]:
    """Every module of dmquant by its full name."""
    paths = [path for folder in ("dmquant", *FOLDERS) for path in (ROOT / folder).rglob("*.py")]
    return {module_name(path): path for path in sorted(paths)}


def module_name(path: Path) -> str:
    """`dmquant.calib.data.store` for calib/data/store.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "dmquant" else ("dmquant", *parts))


def imports(path: Path, modules: Iterable[str]) -> Iterator[str]:
    """Full names of what a file imports anywhere in it: modules of dmquant as such, others by their top package."""
    known = set(modules)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name if name in known else name.partition(".")[0] for name in names)


def room_of(module: str) -> str:
    """The most specific of ROOMS that a module lies in."""
    parts = module.split(".")
    folder = parts[1:] if parts[1:2] and parts[1] in FOLDERS else parts
    named = ("/".join(folder[:2]), folder[0])
    return next((room for room in named if room in ROOMS), "dmquant")


def arrows(modules: Mapping[str, Path]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Pairs of rooms of which the first imports the second, with the modules that do; the doors are left out."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for module, path in modules.items():
        if module in (PUBLIC, f"{PUBLIC}.__main__"):
            continue
        for name in imports(path, modules):
            if name in modules and name != PUBLIC and room_of(module) != room_of(name):
                found.setdefault((room_of(module), room_of(name)), []).append((module, name))
    return found


def reduced(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that do not follow from others: the transitive reduction of a graph without circles."""
    pairs = sorted(set(pairs))
    below = {room: {lower for upper, lower in pairs if upper == room} for room in ROOMS}
    reach: dict[str, set[str]] = {}
    for room in TopologicalSorter(below).static_order():
        reach[room] = below[room].union(*(reach[lower] for lower in below[room]))
    return [
        (upper, lower)
        for upper, lower in pairs
        if not any(lower in reach[other] for other in below[upper] if other != lower)
    ]


WIDTH, HEIGHT, GAP, RISE = 236, 80, 28, 62  # of a box, between boxes of a level, and between levels; pixels
CHARACTERS = 36  # of a purpose on one line


def levels(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Rooms from the lowest level up: each stands one level above the highest that it imports."""
    below = {room: [lower for upper, lower in pairs if upper == room] for room in ROOMS}
    height: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        height[room] = max((height[lower] + 1 for lower in below[room]), default=0)
    return [[room for room in ROOMS if height[room] == level] for level in range(max(height.values()) + 1)]


def draw(pairs: list[tuple[str, str]]) -> str:
    """The rooms as boxes, those that are imported below, and an arrow for each of the pairs, as SVG."""
    rows = levels(pairs)
    across = GAP + (1 + max(column for _, column in ROOMS.values())) * (WIDTH + GAP)
    down = len(rows) * (HEIGHT + RISE)
    places = {
        room: (GAP + ROOMS[room][1] * (WIDTH + GAP), down - (level + 1) * (HEIGHT + RISE) + RISE / 2)
        for level, rooms in enumerate(rows)
        for room in rooms
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:.0f} {down}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 10 5 0 10z" fill="#667"/></marker></defs>',
        f'<rect width="{across:.0f}" height="{down}" fill="#fff"/>',
    ]
    for upper, lower in pairs:
        (x, y), (to_x, to_y) = _edge(places[upper], places[lower], HEIGHT), _edge(places[lower], places[upper], 0)
        bend = (y + to_y) / 2
        curve = f"M{x:.0f} {y:.0f}C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {to_y:.0f}"
        lines.append(f'<path d="{curve}" fill="none" stroke="#667" stroke-width="1.5" marker-end="url(#tip)"/>')
    for room, (x, y) in places.items():
        lines.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="7" {_style(room)}/>')
        texts = [
            (22, 15, "bold", room),
            *((40 + 15 * n, 11.5, "normal", line) for n, line in enumerate(_wrapped(room))),
        ]
        for offset, size, weight, text in texts:
            lines.append(
                f'<text x="{x + WIDTH / 2:.0f}" y="{y + offset:.0f}" font-size="{size}" font-weight="{weight}" '
                f'text-anchor="middle" fill="#223">{text}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _edge(box: tuple[float, float], other: tuple[float, float], below: float) -> tuple[float, float]:
    """Where an arrow meets a box, `below` its upper edge: on the side of the middle where the other box is."""
    lean = max(-WIDTH * 0.4, min(WIDTH * 0.4, (other[0] - box[0]) * 0.25))
    return box[0] + WIDTH / 2 + lean, box[1] + below


def _style(room: str) -> str:
    fills = {"dmquant": "#dbe9ff", "calib": "#e2f3e1", "evaluation": "#fdebd3", "pipelines": "#f1e4f7"}
    return f'fill="{fills[room.partition("/")[0]]}" stroke="#99a"'


def _wrapped(room: str) -> list[str]:
    return textwrap.wrap(ROOMS[room][0], CHARACTERS)


if __name__ == "__main__":
    DRAWING.write_text(draw(reduced(arrows(source_files()))), encoding="utf-8")
