"""What errors cost in the layers of a saved model, by the calibration data of its run."""

import pytest
import torch

from dmquant import quantize_pipeline
from dmquant.calib.layers import importance
from dmquant.calib.layers.moments import alike
from dmquant.diffusers.saving import save_pipeline
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.pipelines.models.opening import open_source
from dmquant.pipelines.runs.importance import data_of, importance_of
from dmquant.recipe import Recipe
from tests.calib.runs import captured
from tests.tiny import TINY, tiny_sd

RECIPE = Recipe(name="int4", weights="int4", granularity="group:32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a tiny PixArt with its calibration data, and the store."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    _, _, store = captured("pixart-sigma", folder / "calibration" / "data" / "0123abcd")
    pipeline = TINY["pixart-sigma"].build()
    quantize_pipeline(pipeline, RECIPE)
    save_pipeline(pipeline, folder / "model")
    return folder, store, pipeline.transformer


def test_the_data_of_a_run_is_found_from_the_run_and_from_its_model(run):
    folder, _, _ = run
    expected = folder / "calibration" / "data" / "0123abcd"
    assert data_of(folder) == data_of(folder / "model") == expected
    assert data_of(folder.parent) is None


def test_importance_is_the_mean_square_of_the_inputs_with_all_rows_alike(run, monkeypatch):
    folder, store, backbone = run
    monkeypatch.setattr(importance, "CALLS", 4)
    found = importance_of(open_source(folder / "model"), data_of(folder), Console())
    assert found.calls == 4
    name, layer = next((name, one) for name, one in backbone.named_modules() if name in found.mean_squares)
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(alike(inputs[0]).flatten(0, -2)))
    with torch.no_grad():
        for index in range(0, len(store), len(store) // 4):
            backbone(**store.batch([index])[1])
    hook.remove()
    expected = torch.cat(seen).square().mean(0)
    assert torch.allclose(found.mean_squares[name], expected, rtol=1e-5)
    assert found.mean_squares.keys() == {name for name, one in open_source(folder / "model").layers.items()}
    assert not any(one._forward_pre_hooks for one in backbone.modules())


def test_without_data_there_is_no_importance(run):
    folder, _, _ = run
    assert importance_of(open_source(folder / "model"), None, Console()) is None


def test_data_of_another_model_is_refused_in_one_line(run, tmp_path):
    folder, _, _ = run
    pipeline = tiny_sd()
    quantize_pipeline(pipeline, RECIPE)
    save_pipeline(pipeline, tmp_path / "model")
    with pytest.raises(UserError, match="is not for this model"):
        importance_of(open_source(tmp_path / "model"), data_of(folder), Console())
