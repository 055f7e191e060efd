"""A rounding method from outside whose scales move: what is kept is values and scales together, to the saved model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from dmquant import rounding
from dmquant.calib.blocks.learn import learn
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import fit_grid
from dmquant.calib.objectives import UnitData, mse
from dmquant.convert import LayerPlan
from dmquant.errors import UsageError
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Learning, Recipe
from tests.calib.runs import calibrated, captured, is_same, quantized_layers, recipe_of, saved_and_loaded


class Options(BaseModel):
    """There is nothing to set."""


class LearnedScales(rounding.Rounding):
    """Nearest values under scales whose logarithms are learned, straight through the rounding."""

    def __init__(self, grid):
        super().__init__(grid)
        self.shift = nn.Parameter(torch.zeros_like(grid.scale))

    def decided_grid(self):
        stored = self.grid.scale * self.shift.detach().exp()
        return replace(self.grid, scales=replace(self.grid.scales, stored=stored.to(self.grid.scales.stored.dtype)))

    def hard(self):
        return self.decided_grid().nearest

    def forward(self):
        rows, columns = self.grid.weight.shape
        change = (self.shift - self.shift.detach()).exp()
        return self.hard() * change.repeat_interleave(-(-columns // change.shape[1]), 1)[:, :columns].expand(rows, -1)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(rounding.METHODS, "registered", {})
    method = SimpleNamespace(
        Options=Options, LEARNS=True, NEEDS_MOMENTS=False, start=lambda grid, options: LearnedScales(grid)
    )
    rounding.register("learned-scales", method)


def test_a_method_is_registered_once_and_known_to_recipes(registered):
    assert "learned-scales" in rounding.method_names()
    assert Recipe(name="x", rounding="learned-scales").calibrated
    with pytest.raises(UsageError, match="rounding method 'gptq' already"):
        rounding.register("gptq", SimpleNamespace())


def test_values_are_kept_with_the_scales_that_they_lie_on():
    torch.manual_seed(0)
    layer = nn.Linear(32, 24, bias=False).requires_grad_(False)
    layer.weight[:, 0] *= 6  # an outlier in every row, which meets little input: absmax scales are far too large
    x = torch.randn(96, 32) * torch.cat([torch.tensor([0.01]), torch.ones(31)])
    spec = WeightSpec.parse("int3", "channel", "absmax", "fp32")
    grid = fit_grid(layer.weight, LayerPlan("layer", spec, None), None)
    quantized = QUANTIZED[nn.Linear].like(layer, spec, None, device="meta")
    learner = Learner("layer", layer, grid, LearnedScales(grid), quantized)
    target = layer(x)
    data = UnitData(
        lambda batch, _: learner.forward(x[list(batch)]), lambda batch: target[list(batch)], range(64), range(64, 96)
    )
    options = Learning(iterations=60, batch_size=16, learning_rate=0.05, checks=6)
    done, kept = learn("layer", [learner], mse.start(data, mse.Options()), options, lambda step, loss: None)
    assert done.error < 0.7 * done.nearest_error
    rounded = kept["layer"]
    assert not torch.equal(rounded.grid.scale, grid.scale)
    assert torch.equal(rounded.quantized().dequantize(), rounded.values)
    quantized.load_quantized(rounded.quantized(), None)
    assert (quantized(x[64:]) - target[64:]).square().mean().item() == pytest.approx(done.error, rel=1e-4)


def test_the_engine_saves_scales_that_moved(registered, tmp_path):
    case = captured("pixart-sigma", tmp_path / "data")
    learning = {"learning_rate": 0.05, "iterations": 8}
    recipe = recipe_of(rounding={"method": "learned-scales"}, learning=learning)
    backbone, done = calibrated(case, recipe, tmp_path / "out")
    plain, _ = calibrated(case, recipe_of(learning={"iterations": 0}), tmp_path / "plain")
    moved = [
        name
        for name, layer in quantized_layers(backbone).items()
        if not torch.equal(layer.scale, quantized_layers(plain)[name].scale)
    ]
    assert moved
    assert any(task["best_step"] > 0 for block in done.blocks for task in block["tasks"])
    assert is_same(calibrated(case, recipe, tmp_path / "out")[0], backbone)  # from the blocks on disk
    assert is_same(saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved"), backbone)


def test_convolutions_learn_with_scales_of_either_sign_from_a_solution(tmp_path):
    case = captured("sd15", tmp_path / "data")
    recipe = recipe_of(
        [
            {"match": "*", "keep": True},
            {"match": ["down_blocks.0.resnets.0.*", "up_blocks.1.resnets.0.*"], "keep": False},
        ],
        keep=False,
        weights="int3",
        store="e3m4",
        scale="lean",
        rounding={"method": "flexround", "begin": {"method": "gptq", "damping": 0.1}},
        learning={"learning_rate": 0.003, "iterations": 6},
    )
    backbone, done = calibrated(case, recipe, tmp_path / "out")
    tasks = [task for block in done.blocks for task in block["tasks"]]
    assert all(task["error"] < task["nearest_error"] for task in tasks)
    assert any(task["best_step"] > 0 for task in tasks)
    assert any((layer.scale.view(torch.uint8) >= 128).any() for layer in quantized_layers(backbone).values())
    assert is_same(saved_and_loaded("sd15", backbone, done.recipe, tmp_path / "saved"), backbone)
