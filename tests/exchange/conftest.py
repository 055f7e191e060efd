import pytest

from dmquant.pipelines.api import quantize_pipeline
from dmquant.pipelines.models.opening import open_source
from dmquant.recipe import Recipe
from tests.tiny import tiny_pixart, tiny_sd


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(weights="nvfp4", unet=True, ...)`: a tiny pipeline quantized by a recipe of these settings, opened."""
    made = {}

    def save(unet=False, **settings):
        key = repr((unet, sorted(settings.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("saved") / "model"
            pipeline = tiny_sd() if unet else tiny_pixart(width=64)
            quantize_pipeline(pipeline, Recipe(name="tried", **settings), out=made[key])
        return open_source(made[key])

    return save
