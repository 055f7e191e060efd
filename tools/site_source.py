"""A hook of mkdocs: the code as it is once installed, in build/source, where mkdocstrings looks for docstrings.

In the repository the folders calib, pipelines, evaluation and configs stand beside the package that they are parts of.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = ("calib", "pipelines", "evaluation", "configs")
SOURCE = ROOT / "build" / "source"


def on_startup(command: str, dirty: bool) -> None:
    """Make the folder anew, before mkdocstrings asks what it holds."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    only_code = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "dmquant", SOURCE / "dmquant", ignore=only_code)
    for name in BESIDE:
        shutil.copytree(ROOT / name, SOURCE / "dmquant" / name, ignore=only_code)
