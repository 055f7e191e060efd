"""The recipe that was typed, or a file that others quantized in the place of one: measured like it."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dmquant.cpu.compiling import missing_to_compile
from dmquant.diffusers.families import GENERIC
from dmquant.diffusers.families.generic import COMPONENTS
from dmquant.errors import UsageError, UserError
from dmquant.exchange.interfaces import Foreign
from dmquant.exchange.layers import kind_of
from dmquant.host.hashes import sha256_once
from dmquant.host.names import readable
from dmquant.pipelines.models.opening import open_foreign
from dmquant.pipelines.models.registry import ModelSpec, family_for, pipeline_parts
from dmquant.pipelines.runs.components import check_names, with_components
from dmquant.pipelines.runs.runfolder import MODEL
from dmquant.recipe import Recipe
from dmquant.settings import NO_FORMAT

FILE = "file:"
"""Begins the name of a file where a recipe's is expected."""


@dataclass(frozen=True)
class FileRecipe:
    """What a run needs to know of a quantized model that is there already."""

    foreign: Foreign
    name: str

    calibrated: ClassVar[bool] = False
    rules: ClassVar[tuple[()]] = ()
    description: ClassVar[str] = ""

    @classmethod
    def open(cls, path: Path) -> "FileRecipe":
        """Read the headers of the file or folder at `path`; UserError as `open_foreign` raises it."""
        parts = path.resolve().parts
        named = next((part for part in reversed(parts) if part not in (*COMPONENTS, MODEL)), path.name)
        return cls(open_foreign(path), readable(Path(named).stem if path.is_file() else named))

    def with_settings(self, *, name: str) -> "FileRecipe":
        """The same under another name."""
        return replace(self, name=name)

    @property
    def weights(self) -> str:
        """The names of the formats of its layers, the most frequent first."""
        return _named(layer.format for layer in self.foreign.layers.values())

    @property
    def activations(self) -> str:
        """The formats that its layers round their inputs to, the most frequent first; `none` where they do not."""
        return _named(kind_of(layer.activations) or NO_FORMAT for layer in self.foreign.layers.values())

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of its files by their names."""
        config = self.foreign.found.path / "config.json"
        files = (*self.foreign.found.files, *([config] if config.is_file() else ()))
        return {path.name: sha256_once(path) for path in files}

    def to_dict(self) -> dict[str, Any]:
        """What run.yaml and reports say of it, in plain JSON types; paths are not among them."""
        return {
            "name": self.name,
            "file": self.foreign.found.path.name,
            "format": self.foreign.format.title,
            "dialect": dict(self.foreign.dialect),
            "weights": self.weights,
            "activations": self.activations,
            "sha256": self.hashes,
        }


def _named(names: Iterable[str]) -> str:
    return "+".join(name for name, _ in Counter(names).most_common())


def chosen_recipe(
    model: ModelSpec, source: str, w: str | None, a: str | None, components: Sequence[str] | None = None
) -> Recipe | FileRecipe:
    """What stands for a recipe on the command line, for a model, with its `components`; a file's headers are read.

    Raises UsageError for a calibrated recipe of a family that knows no blocks, for other formats than a file has, and
    for parts that the model's pipeline has not; UserError where this machine cannot compile what the recipe asks for.
    """
    if source.startswith(FILE):
        if w or a or components:
            raise UsageError(f"{source} brings its own formats: leave out --w, --a and --component")
        if not (path := source.removeprefix(FILE)):
            raise UsageError(f"{FILE} names no file: write {FILE}PATH")
        return FileRecipe.open(Path(path))
    recipe = with_components(Recipe.load(source, w, a), components or ())
    check_names(recipe, pipeline_parts(model.pipeline), family_for(model).component)
    if model.family == GENERIC and recipe.calibrated:
        raise UsageError(
            f"recipe {recipe.name} is calibrated, block by block, and the family {GENERIC} knows no blocks: "
            "use --recipe rtn"
        )
    if recipe.learning.compile and recipe.calibrated and (missing := missing_to_compile()):
        raise UserError(f"recipe {recipe.name} has learning: compile, for which this machine lacks {missing}")
    return recipe
