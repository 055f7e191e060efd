"""What tests of the training tools share: their modules, and a package of eight drawn emoji."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

TOOLS = Path(__file__).parents[2] / "tools"
CAPTIONS = Path(__file__).with_name("emoji_captions.txt")
COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="session")
def tools():
    """Imports a module of tools/ by name, as a tool run from there does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Four colours of circle and square, and an entry without an image."""
    root = tmp_path_factory.mktemp("package")
    folder = root / "img/google/64"
    folder.mkdir(parents=True)
    entries = [{"image": "none.png", "name": "NOTHING", "category": "Symbols", "has_img_google": False}]
    for colour in COLOURS:
        for shape in ("ellipse", "rectangle"):
            icon = Image.new("RGBA", (64, 64))
            getattr(ImageDraw.Draw(icon), shape)((8, 8, 56, 56), fill=colour)
            icon.save(folder / f"{colour}-{shape}.png")
            entries.append(
                {
                    "image": f"{colour}-{shape}.png",
                    "name": f"{colour} {shape}".upper(),
                    "category": "Symbols",
                    "subcategory": "geometric-shape",
                    "has_img_google": True,
                }
            )
    (root / "emoji.json").write_text(json.dumps(entries))
    return root
