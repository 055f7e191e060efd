"""Principal directions of the input in 16 bits: the function stays, and what lies in them is not quantized."""

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec, quantize
from dmquant.transforms import InputStatistics, create, fit_of

INPUTS = ActivationSpec.parse("nvfp4")
LAYERS = {
    "linear": lambda: nn.Linear(48, 24),
    "without bias": lambda: nn.Linear(48, 24, bias=False),
    "conv": lambda: nn.Conv2d(48, 24, 3, padding=1),
    "strided": lambda: nn.Conv2d(48, 24, (3, 1), stride=2, padding=(1, 0), padding_mode="circular"),
}


def inputs(layer, directions=4, noise=0.1, rows=3):
    """Nearly all in a few directions."""
    x = torch.randn(rows, 16, directions) @ (10 * torch.randn(directions, 48)) + noise * torch.randn(rows, 16, 48)
    return x if isinstance(layer, nn.Linear) else x.unflatten(1, (4, 4)).movedim(-1, 1)


def fitted(layer, x, rank=4, activations=None):
    """The layer with its weight rounded to nearest beside a subspace fitted to `x`, and the transform."""
    transforms = create([("subspace", {"rank": rank})], layer, None)
    [parts] = fit_of(transforms[0]).candidates(
        transforms[0], layer.weight.detach(), x if x is None else InputStatistics(torch.zeros(1, 48), [x])
    )
    quantized = QUANTIZED[type(layer)].like(layer, WeightSpec.parse("fp4", "group:16"), activations, None, transforms)
    quantized.load_parts({"subspace": parts})
    quantized.load_quantized(quantize(layer.weight, quantized.weight_spec), layer.bias)
    return quantized, transforms[0]


def with_exact_weight(quantized, layer):
    """The layer as if its codes stood for exactly the float layer's weight."""
    quantized.dequantize = lambda dtype: layer.weight.to(dtype)
    quantized.kernel_choice = "reference", layer.weight.device, None
    return quantized


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_the_function_stays_but_for_the_rounding_of_its_factors(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    x = inputs(layer, noise=1.0)
    quantized, _ = fitted(layer, x)
    assert relative(with_exact_weight(quantized, layer)(x), layer(x)) < 2**-8
    assert relative(quantized.float_weight(), layer.weight) < 2**-8


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_inputs_in_the_directions_meet_neither_codes_nor_rounding(kind):
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    x = inputs(layer, noise=0.0)
    plain = QUANTIZED[type(layer)].like(layer, WeightSpec.parse("fp4", "group:16"), INPUTS)
    plain.load_quantized(quantize(layer.weight, plain.weight_spec), layer.bias)
    assert relative(plain(x), layer(x)) > 0.05
    assert relative(fitted(layer, x, activations=INPUTS)[0](x), layer(x)) < 0.01


def test_the_directions_are_those_of_least_rest():
    """No other four leave less of the inputs: Eckart and Young; rounding to bfloat16 apart."""
    torch.manual_seed(2)
    layer = nn.Linear(48, 24)
    x = torch.randn(1, 200, 48) * torch.logspace(0, -1, 48)
    quantized, transform = fitted(layer, x)
    rest = transform.input(x, quantized.parts(transform), -1)
    least = torch.linalg.svdvals(x[0])[4:].square().sum()
    assert least * 0.999 <= rest.square().sum() <= least * 1.001


def test_a_quiet_row_counts_as_much_as_a_loud_one():
    torch.manual_seed(3)
    layer, quiet = nn.Linear(48, 24), torch.zeros(1, 16, 48)
    quiet[..., 7] = torch.randn(16)
    loud = 1000 * torch.randn(1, 16, 2) @ torch.randn(2, 48)
    quantized, transform = fitted(layer, torch.cat([quiet, loud]), rank=3)
    rest = transform.input(quiet, quantized.parts(transform), -1)
    assert rest.norm() < 0.02 * quiet.norm()


@torch.no_grad()
def test_what_is_quantized_is_the_rest():
    torch.manual_seed(4)
    layer = nn.Linear(48, 24)
    x = inputs(layer, noise=1.0)
    quantized, transform = fitted(layer, x, activations=INPUTS)
    parts = quantized.parts(transform)
    directions, up = parts["directions"].float(), parts["up"].float()
    rest = x - x @ directions.T @ directions
    expected = fake_quantize(rest, INPUTS) @ quantized.dequantize(torch.float32).T + layer.bias
    assert torch.allclose(quantized(x), expected + x @ directions.T @ up.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("layer", "rank"), [(lambda: nn.Linear(7, 5), 3), (lambda: nn.Linear(1, 4), 1)])
@torch.no_grad()
def test_narrow_layers_keep_half_of_their_channels_and_nothing_without_data(layer, rank):
    torch.manual_seed(5)
    layer = layer()
    quantized, transform = fitted(layer, None, rank=64)
    assert transform.rank == rank
    x = torch.randn(2, 9, layer.in_features)
    assert relative(with_exact_weight(quantized, layer)(x), layer(x)) < 2**-7


def test_its_bits_and_products_are_counted():
    [linear] = create([("subspace", {"rank": 8})], nn.Linear(64, 32), None)
    [conv] = create([("subspace", {"rank": 8})], nn.Conv2d(64, 32, 3), None)
    assert [part.shape for part in linear.parts().values()] == [(8, 64), (32, 8)]
    assert [part.shape for part in conv.parts().values()] == [(8, 64), (32, 72)]
    assert (linear.added_products(), conv.added_products()) == (8 * (128 + 32), 8 * (128 + 32 * 9))
