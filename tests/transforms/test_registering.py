"""A transform from outside of the package is named in recipes, fitted by calibration, saved and read back."""

import pytest
import torch
from pydantic import BaseModel

from dmquant.errors import UsageError
from dmquant.recipe import Recipe
from dmquant.transforms import Fit, Method, Part, Storage, get_method, method_names, register, registry
from tests.calib.runs import calibrated, captured, is_same, quantized_layers, recipe_of, saved_and_loaded


class Options(BaseModel):
    steps: int = 1


class Mean(Storage):
    """The mean of each row stands beside the codes of what is left."""

    name, STAGE = "mean", 25

    def parts(self):
        return {"rows": Part((self.shape[0], 1), torch.float32)}

    def to_quantize(self, weight, parts):
        return weight - parts["rows"].view(-1, *[1] * (weight.ndim - 1))

    def complete(self, weight, parts):
        return weight + parts["rows"].view(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)


class RowMeans(Fit):
    def candidates(self, storage, weight, statistics):
        return [{"rows": weight.flatten(1).mean(1, keepdim=True)}]


@pytest.fixture
def mean(monkeypatch):
    monkeypatch.setattr(registry.METHODS, "registered", {})
    return register(Method(Options, Mean, fit=lambda options: RowMeans()))


def test_it_goes_the_whole_way_beside_the_packages_own(mean, tmp_path):
    case = captured("pixart-sigma", tmp_path / "data")
    transforms = ["smooth", {"method": "mean", "steps": 2}, {"method": "bias"}]
    backbone, done = calibrated(case, recipe_of(transforms=transforms, rounding="nearest"), tmp_path / "codes")
    for name, layer in quantized_layers(backbone).items():
        one = next(one for one in layer.transforms if one.name == "mean")
        assert one.options.steps == 2
        assert layer.parts(one)["rows"].any(), name
    assert is_same(saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved"), backbone)


def test_recipes_check_its_options_and_its_name_is_listed(mean):
    assert get_method("mean") is mean
    assert "mean" in method_names()
    assert not Recipe(name="x", transforms=["mean"]).calibrated
    with pytest.raises(ValueError, match="steps: Input should be a valid integer"):
        Recipe(name="x", transforms=[{"method": "mean", "steps": "many"}])


@pytest.mark.parametrize("name", ["mean", "smooth"])
def test_a_name_is_given_once(mean, name):
    taken = type("Taken", (Storage,), {"name": name, "STAGE": 1})
    with pytest.raises(UsageError, match=f"there is a transform '{name}' already"):
        register(Method(Options, taken))


def test_without_it_the_recipe_says_what_there_is():
    with pytest.raises(ValueError, match=r"mean.*known: bias, cfp, equalize"):
        Recipe(name="x", transforms=["mean"])
