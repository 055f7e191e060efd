"""Models whose layers have transforms load through diffusers, compile, copy and offload like any other."""

import copy

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.convert import quantize_
from dmquant.diffusers.quantizer import QuantConfig, mark_quantized
from dmquant.diffusers.timesteps import share_timesteps
from dmquant.layers import QuantConv2d, QuantLinear, quantize_layer
from dmquant.pipelines.runs.footprint import footprint
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from dmquant.transforms import create
from tests.diffusers.test_quantizer import BUILDERS, example, packed

LOWRANK = {"method": "lowrank", "rank": 2, "iterations": 2}
DATA_FREE = {
    "lowrank": [LOWRANK],
    "outliers": ["outliers"],
    "rotate": ["rotate"],
    "equalize": ["equalize"],
    "all": ["equalize", LOWRANK, "outliers", "rotate"],
}
SPLITS = {"up_blocks.0.resnets.0.conv_shortcut": 20, "up_blocks.1.resnets.0.conv1": 7}


def recipe_of(transforms):
    return Recipe.load("w4a6").with_settings(transforms=transforms).splitting(SPLITS)


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=DATA_FREE)
def transforms(request):
    return DATA_FREE[request.param]


@pytest.fixture(scope="module")
def quantized(kind, transforms):
    """A quantized backbone, not to be changed."""
    build, component = BUILDERS[kind]
    model, recipe = getattr(build(), component), recipe_of(transforms)
    quantize_(model, recipe)
    mark_quantized(model, recipe)
    return model


class TestDataFree:
    """Transforms that take no data, by `quantize_` and while a model is loaded."""

    def test_save_and_reload_is_bit_equal(self, quantized, tmp_path):
        quantized.save_pretrained(tmp_path)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = type(quantized).from_pretrained(tmp_path, dtype=dtype)
            before, after = packed(quantized), packed(loaded)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert footprint(loaded).quantized_bytes == footprint(quantized).quantized_bytes
            if dtype == torch.float32:
                assert torch.equal(example(loaded), example(quantized))
            else:
                assert example(loaded, dtype).isfinite().all()

    def test_quantizing_while_loading_gives_the_same_model(self, kind, transforms, quantized, tmp_path):
        build, component = BUILDERS[kind]
        exact = getattr(build(), component)
        exact.save_pretrained(tmp_path / "exact")
        config = QuantConfig(recipe_of(transforms))
        loaded = type(exact).from_pretrained(tmp_path / "exact", quantization_config=config)
        expected = packed(quantized)
        found = packed(loaded)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        loaded.save_pretrained(tmp_path / "saved")
        again = type(exact).from_pretrained(tmp_path / "saved")
        assert torch.equal(example(again), example(loaded))


class Net(nn.Module):
    """A convolution and a linear with every transform, the bias correction by timestep."""

    SETTINGS = (
        ("smooth", {}),
        ("rotate", {"size": 8}),
        ("outliers", {"share": 0.02}),
        ("lowrank", {"rank": 2}),
        ("bias", {"ranges": 3}),
    )

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        spec, activations = WeightSpec.parse("fp4", "group:16"), ActivationSpec.parse("fp6")
        self.conv, self.linear = (
            quantize_layer(layer, spec, activations, transforms=create(self.SETTINGS, layer, None))
            for layer in (nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 12))
        )
        for layer in (self.conv, self.linear):
            layer.load_parts({"bias": {"table": torch.randn(3, layer.weight_shape[0])}})

    def forward(self, x):
        return self.linear(self.conv(x).flatten(2).mT)


def told(model, timesteps):
    ranges = share_timesteps(model)
    ranges.set(torch.tensor(timesteps))
    return ranges


def test_one_graph_holds_for_every_timestep():
    model, graphs = Net(), []
    ranges = told(model, [10, 900])

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled, x = torch.compile(model, backend=count, fullgraph=True), torch.randn(2, 8, 5, 5)
    for timesteps in ([10, 900], [500, 400]):
        ranges.set(torch.tensor(timesteps))
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert len(graphs) == 1


def test_offloaded_and_copied_they_give_the_same_output():
    accelerate = pytest.importorskip("accelerate")
    model, x = Net(), torch.randn(2, 8, 5, 5)
    told(model, [10, 900])
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.conv.lowrank_up.is_meta
    assert torch.equal(model(x), expected)


def test_gradients_reach_the_input_for_adapters_below():
    model = Net()
    told(model, [10])
    layer = model.linear
    layer.activations = None
    x = torch.randn(4, 16, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.float_weight().sum(0).expand(4, -1), atol=1e-4)


def test_their_weight_stands_for_the_float_layers():
    torch.manual_seed(0)
    float_layer = nn.Linear(64, 64)
    spec, settings = WeightSpec.parse("fp8"), Net.SETTINGS[:4]
    layer = quantize_layer(float_layer, spec, None, transforms=create(settings, float_layer, None))
    assert (layer.weight - float_layer.weight).norm() < 0.05 * float_layer.weight.norm()
    assert isinstance(layer, QuantLinear)
    assert "transforms=smooth+rotate:8+outliers:0.02+lowrank:2" in repr(layer)
    assert not isinstance(layer, QuantConv2d)
