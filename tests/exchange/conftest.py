"""Models that dmquant saved, shared by the tests of all formats."""

import pytest

from dmquant import quantize_pipeline
from dmquant.diffusers.saving import save_pipeline
from tests.tiny import tiny_pixart


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function that gives the folder of a tiny pipeline quantized by a recipe without data; each is made once."""
    made = {}

    def make(recipe, build=tiny_pixart, **options):
        key = (recipe.to_dict().__repr__(), build.__name__, repr(options))
        if key not in made:
            pipeline = build(**options)
            quantize_pipeline(pipeline, recipe)
            made[key] = tmp_path_factory.mktemp("saved") / "model"
            save_pipeline(pipeline, made[key])
        return made[key]

    return make
