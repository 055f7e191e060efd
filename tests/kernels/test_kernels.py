"""Kernels: which one runs a layer, that one may be forced or come from outside, and what becomes of its own weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmquant import kernels
from dmquant.activations import ActivationSpec
from dmquant.errors import UsageError
from dmquant.kernels.reference import Reference
from dmquant.layers import quantize_layer
from dmquant.pipelines.runs.footprint import kernels_used
from dmquant.qtensor import WeightSpec

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Unpacked(Reference):
    """Keeps the decoded weight of every layer of whole groups, and counts how often it multiplies."""

    name, cost, MAKES_WEIGHTS = "unpacked", 1, True
    description = "a toy"
    lacks: str | None = None

    def __init__(self):
        self.products = 0

    def missing(self):
        return self.lacks

    def refuses(self, layer, device):
        size = layer.weight_spec.granularity.size
        return None if size and layer.weight_shape[1] % size == 0 else "groups do not divide the input channels"

    def prepare(self, layer):
        return {"weight": layer.dequantize(torch.float32)}

    def linear(self, x, layer):
        if not torch.compiler.is_compiling():
            self.products += 1
        return F.linear(layer.quantize_input(x), layer.kernel_weight.to(x.dtype), layer.bias)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", dict(kernels.KERNELS))
    kernel = Unpacked()
    kernels.register(kernel)
    return kernel


def layer_of(granularity="group:16", seed=0, **settings):
    torch.manual_seed(seed)
    return quantize_layer(nn.Linear(64, 8), WeightSpec.parse("fp4", granularity), ActivationSpec.parse("fp6"))


def test_a_registered_kernel_runs_the_layers_that_it_takes(toy):
    model = nn.Sequential(layer_of(), layer_of("group:24"), nn.Linear(8, 8))
    with kernels.forced("reference"):
        expected = model[0](X)
    assert toy.products == 0
    assert torch.equal(model[0](X), expected)
    model[1](X)
    assert toy.products == 1
    assert kernels_used(model) == {"unpacked": 1, "cpu": 1}
    assert ["kernel=unpacked" in repr(layer) for layer in model] == [True, False, False]


def test_before_any_call_a_layer_names_the_kernel_that_will_run():
    layer = layer_of()
    assert kernels_used(layer) == {"cpu": 1}
    assert "kernel=cpu" in repr(layer)


def test_weights_of_a_kernel_are_not_saved_and_follow_the_codes(toy):
    layer, other = layer_of(), layer_of(seed=1)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = layer(X)
    assert "kernel_weight" in dict(layer.named_buffers())
    assert layer.state_dict().keys() == state.keys()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(X), other(X))
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(X), expected)
    layer.qweight = other.qweight
    layer.scale = other.scale
    layer.bias = other.bias
    assert torch.equal(layer(X), other(X))


def test_copies_and_casts_make_weights_of_their_own(toy):
    layer = layer_of()
    expected = layer(X)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not list(twin.buffers())
        assert torch.equal(twin(X), expected)
    assert not list(layer.to(torch.bfloat16).buffers()), "a cast would have rounded the weight"
    assert layer(X.bfloat16()).dtype == torch.bfloat16
    assert layer.kernel_weight.dtype == torch.float32


def test_a_layer_that_has_run_compiles_into_one_graph(toy):
    layer = layer_of()
    expected, graphs = layer(X), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    assert torch.equal(compiled(X), expected)
    assert torch.equal(compiled(X), expected)
    assert len(graphs) == 1


def test_the_environment_variable_forces_a_kernel(toy, monkeypatch):
    layer = layer_of()
    layer(X)
    monkeypatch.setenv("DMQUANT_KERNEL", "reference")
    layer(X)
    assert (layer.kernel, toy.products) == ("reference", 1)
    with kernels.forced("unpacked"):
        layer(X)
    assert (layer.kernel, toy.products) == ("unpacked", 2)
    monkeypatch.setenv("DMQUANT_KERNEL", "unpaked")
    with pytest.raises(UsageError, match=r"unknown kernel 'unpaked': did you mean 'unpacked'"):
        layer(X)


def test_a_forced_kernel_that_cannot_run_a_layer_says_why(toy):
    with kernels.forced("unpacked"), pytest.raises(UsageError, match="groups do not divide the input channels"):
        layer_of("group:24")(X)
    with pytest.raises(UsageError, match=r"known: unpacked, .*integer, .*cpu, .*reference"), kernels.forced("tpu"):
        pass
    toy.lacks = "no such unit in this machine"
    with kernels.forced("unpacked"), pytest.raises(UsageError, match="no such unit"):
        layer_of()(X)
    layer = layer_of()
    layer(X)
    assert layer.kernel == "cpu"


def test_a_name_is_given_once(toy):
    with pytest.raises(UsageError, match="kernel 'unpacked' already"):
        kernels.register(Unpacked())


def test_on_another_device_the_kernel_is_chosen_anew():
    layer = layer_of()
    layer(X)
    assert layer.kernel == "cpu"
    assert layer.to("meta").kernel == "reference"
