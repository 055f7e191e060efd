"""torch.compile takes a quantized layer as one operator: what eager gives, bit for bit, in graphs that are shared."""

import pytest
import torch
from torch import nn

from dmquant.convert import quantize_
from dmquant.layers import QUANTIZED
from dmquant.recipe import Recipe

CASES = {
    "W4A6": {"weights": "fp4", "activations": "fp6"},
    "W4A16": {"weights": "fp4"},
    "W8A8, integers": {"weights": "int8", "activations": "int8", "granularity": "channel"},
    "NVFP4": {"weights": "nvfp4", "activations": "fp6"},
    "lookup": {"weights": "nl4"},
    "low rank": {"weights": "fp4", "activations": "fp6", "transforms": [{"method": "lowrank", "rank": 2}]},
}


def recipe(**settings):
    return Recipe(name="traced", keep="none", **settings)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.out = nn.Linear(16, 24)

    def forward(self, x):
        return self.out(self.back(torch.nn.functional.gelu(self.wide(x))).flatten(2))


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


class Counter:
    """A backend that counts graphs and the operators of layers in them."""

    def __init__(self):
        self.graphs, self.layers = 0, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.layers += sum("dmquant.layer" in str(node.target) for node in graph.graph.nodes)
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_each_layer_is_one_operator_and_gives_what_it_gives_without(settings):
    model, counter = network(), Counter()
    quantize_(model, recipe(**settings))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (1, 3):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, 16, 4, 4).to(memory_format=layout)
            assert torch.equal(compiled(x), model(x))
    assert counter.layers == 3 * counter.graphs


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_is_told_how_outputs_lie(layout):
    model = network()
    quantize_(model, recipe(weights="fp4", activations="fp6"))
    x = torch.randn(2, 16, 4, 4).to(memory_format=layout)
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-6)


@torch.no_grad()
def test_blocks_that_are_alike_share_a_graph_with_tensors_of_their_own():
    counter, x = Counter(), torch.randn(2, 16, 4, 4)
    for seed in (0, 1):
        block = network(seed)
        quantize_(block, recipe(weights="fp4", activations="fp6"))
        expected = block(x)
        block.compile(fullgraph=True, backend=counter)
        assert torch.equal(block(x), expected)
    assert counter.graphs == 1


@torch.no_grad()
def test_layers_of_other_formats_do_not_although_their_tensors_look_alike():
    """Codes of both formats have six bits: one read as the other would be wrong numbers without an error."""
    counter, x = Counter(), torch.randn(2, 16, 4, 4)
    for fmt in ("fp6_e2m3", "fp6_e3m2"):
        block = network()
        quantize_(block, recipe(weights=fmt, activations="fp6"))
        expected = block(x)
        block.compile(backend=counter)
        assert torch.equal(block(x), expected)
    assert counter.graphs == 2


@torch.no_grad()
def test_a_layer_that_changes_is_traced_anew():
    model, x = network(), torch.randn(2, 16, 4, 4)
    quantize_(model, recipe(weights="fp4", activations="fp6"))
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    for layer in model.modules():
        if isinstance(layer, tuple(QUANTIZED.values())):
            layer.activations = None
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)


def test_gradients_go_through_a_compiled_model_as_through_it_alone():
    model, counter = network(), Counter()
    quantize_(model, recipe(weights="fp4", activations="fp6"))
    gradients = []
    for one in (model, torch.compile(model, backend=counter)):
        x = torch.ones(1, 16, 4, 4, requires_grad=True)
        one(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, atol=1e-5)
    assert counter.layers == 0
