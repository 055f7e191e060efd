"""Layers become quantized where they are: in all their places, with their hooks, or not at all."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dmquant.convert import quantize_
from dmquant.errors import UsageError
from dmquant.layers import QuantConv2d, QuantLinear, become_, quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe

PLAIN = Recipe(name="plain", keep="none", weights="fp8", activations="none")


class Shared(nn.Module):
    """Three layers, the second of which is used under two names, and a pair whose weight is one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.tied, self.conv = (
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Conv2d(1, 4, 3),
        )
        self.again = self.second
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.conv(self.tied(self.again(self.second(self.first(x))))[None])


X = torch.randn(4, 32)


def test_a_layer_of_two_names_is_quantized_once_and_found_under_both():
    model = Shared()
    reports = quantize_(model, PLAIN)
    assert [report.plan.name for report in reports] == ["first", "second", "tied", "conv"]
    assert type(model.again) is QuantLinear
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.again is twin.second
        assert torch.equal(twin(X), model(X))
    other = Shared()
    quantize_(other, PLAIN)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_layers_of_one_weight_have_the_same_codes():
    model = Shared()
    quantize_(model, PLAIN)
    assert torch.equal(model.tied.qweight, model.first.qweight)


def test_hooks_stay_and_can_be_taken_off():
    model, seen = Shared(), []
    layer = model.second
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(lambda *_: seen.append("gradient in")),
        layer.register_full_backward_hook(lambda *_: seen.append("gradient out")),
        model.conv.register_forward_hook(lambda module, *_: seen.append(type(module).__name__)),
    ]
    quantize_(model, PLAIN)
    layer(X.clone().requires_grad_()).sum().backward()
    model.conv(X[None])
    assert seen == ["before", "after", "gradient in", "gradient out", "QuantConv2d"]
    for handle in handles:
        handle.remove()
    layer(X)
    assert len(seen) == 5


def test_whatever_was_set_on_a_layer_stays():
    model = Shared()
    layer = model.first
    layer.note = {"rank": 4}
    layer.register_buffer("seen", torch.ones(3))
    layer.gate = nn.Parameter(torch.ones(2))
    layer.inner = nn.Identity()
    layer.eval()
    quantize_(model, PLAIN)
    assert model.first is layer
    assert (layer.note, layer.training) == ({"rank": 4}, False)
    assert {"seen", "gate", "qweight"} <= layer.state_dict().keys()
    assert isinstance(layer.inner, nn.Identity)
    assert layer.weight.shape == (32, 32)


@pytest.mark.parametrize("name", ["scale", "weight_spec", "parts"])
def test_a_name_that_quantized_layers_use_is_refused(name):
    layer = nn.Linear(32, 32)
    setattr(layer, name, 1.0)
    with pytest.raises(UsageError, match=f"^a quantized layer uses the name '{name}', which was set on it"):
        become_(layer, quantize_layer(layer, WeightSpec.parse("fp4"), None))
    assert type(layer) is nn.Linear


class Loud(nn.Linear):
    """A layer that computes something else."""


class Foreign(torch.Tensor):
    """A weight that another library packs."""


def foreign(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Foreign))


def integers(model):
    model.second = Loud(32, 32)
    model.second.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)


def parametrized(model):
    parametrize.register_parametrization(model.second, "weight", nn.Identity())


def replaced(model):
    model.second.forward = lambda x: x


def within(model):
    model.second = torch.compile(model.second, backend="eager")


def marked(model):
    model.quantization_method = "torchao"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (foreign, r"layer conv holds Foreign of torch\.float32, as other quantizers"),
        (integers, r"layer second holds Parameter of torch\.int8, as other quantizers"),
        (
            lambda model: model.first.to(torch.float8_e4m3fn),
            r"layer first holds Parameter of torch\.float8",
        ),
        (parametrized, r"layer second holds no plain weight"),
        (
            lambda model: parametrizations.weight_norm(model.conv),
            r"layer conv holds no plain weight",
        ),
        (
            lambda model: prune.random_unstructured(model.second, "weight", 0.5),
            r"layer second holds no plain weight",
        ),
        (replaced, r"layer second has a forward of its own"),
        (within, r"layer second is compiled: quantize it first, then torch\.compile it"),
        (marked, r"Shared is quantized by torchao already: start from the full-precision model"),
    ],
)
def test_what_is_not_plain_is_refused_in_one_line_before_anything_changes(spoil, said):
    model = Shared()
    spoil(model)
    kinds = [type(part) for part in model.modules()]
    with pytest.raises(UsageError, match=f"^{said}[^\n]*$"):
        quantize_(model, PLAIN)
    assert [type(part) for part in model.modules()] == kinds


def test_weights_that_are_no_numbers_are_refused_before_anything_changes():
    model = Shared()
    model.conv.weight.data[0] = float("inf")
    with pytest.raises(UsageError, match=r"^layer conv: the weights hold NaN or infinity"):
        quantize_(model, PLAIN)
    assert not any(isinstance(part, QuantLinear | QuantConv2d) for part in model.modules())


def test_what_is_left_of_a_hook_that_was_removed_does_not_count():
    accelerate = pytest.importorskip("accelerate")
    model = Shared()
    accelerate.hooks.add_hook_to_module(model.second, accelerate.hooks.ModelHook())
    with pytest.raises(UsageError, match=r"^layer second has a forward of its own"):
        quantize_(model, PLAIN)
    accelerate.hooks.remove_hook_from_module(model.second)
    quantize_(model, PLAIN)
    expected = Shared()
    quantize_(expected, PLAIN)
    assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("part", ["", "second"])
def test_a_module_compiled_in_place_runs_its_codes(part):
    model, eager = Shared(), Shared()
    model.get_submodule(part).compile(backend="eager")
    before = model(X)
    for one in (model, eager):
        quantize_(one, PLAIN)
    assert torch.equal(model(X), eager(X))
    assert not torch.equal(model(X), before)
