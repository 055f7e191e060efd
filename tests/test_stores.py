"""Scale stores: how far powers of two go, and a store that comes from outside."""

import pytest
import torch
from torch import nn

from dmquant import stores
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.layers import QuantLinear, quantize_layer
from dmquant.qtensor import WeightSpec, quantize_tensor
from dmquant.recipe import Recipe


@pytest.mark.parametrize(("format", "octaves"), [("fp4_e2m1", 14), ("fp6_e2m3", 11), ("fp6_e3m2", 9)])
def test_so_many_octaves_of_scales_leave_a_formats_values_exact_in_fp8(format, octaves):
    """docs/formats.md names these."""
    values = get_format(format).values
    shifted = values * torch.tensor(2.0) ** torch.arange(-30, 31).view(-1, 1)
    exact = (shifted.to(torch.float8_e4m3fn).float() == shifted).all(1)
    assert exact.sum() - 1 == octaves
    assert exact.diff().sum() == 2, "the shifts lie side by side"


def test_pow2_scales_are_at_most_so_far_below_their_channels():
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -12, 96)
    for rule, above in (("absmax", 0), ("mse", 1)):
        octaves = quantize_tensor(weight, "fp4", "group:16", rule, "pow2").scales.stored.int() - 127
        assert octaves.min() == -stores.OCTAVES_BELOW
        assert octaves.max() <= above


@pytest.fixture
def halves():
    """Scales that are 16 bits of a fraction of their row's largest: a store with a base of its own kind."""
    store = stores.Store(
        dtype=torch.float16,
        encode=lambda amplitude, fmt, base: (amplitude / fmt.max / base).clamp(min=2**-14).half(),
        decode=lambda stored, base: stored.float() * base,
        search=(0.8, 0.9, 1.1),
        base_of="row",
        fit_base=lambda largest, fmt: largest / fmt.max,
    )
    stores.register("halves", store)
    yield
    del stores.STORES["halves"]


@pytest.mark.parametrize("granularity", ["group:16", "channel", "tensor"])
def test_a_store_from_outside_is_known_everywhere(halves, granularity):
    layer = nn.Linear(48, 12)
    spec = WeightSpec.parse("fp4", granularity, "mse", "halves")
    rows = 1 if granularity == "tensor" else 12
    assert spec.base_shape((12, 48)) == (rows, 1)
    quantized = quantize_layer(layer, spec, None)
    lost = (quantized.weight - layer.weight).square().mean() / layer.weight.square().mean()
    assert lost < 0.03
    empty = QuantLinear.like(layer, spec, None, device="meta")
    empty.load_state_dict(quantized.state_dict(), assign=True)
    assert torch.equal(empty.weight.data, quantized.weight.data)
    assert Recipe(name="x", store="halves").store == "halves"


def test_a_store_is_registered_once(halves):
    for name in ("halves", "bf16", "table"):
        with pytest.raises(UsageError, match="already"):
            stores.register(name, stores.STORES["fp32"])
    assert WeightSpec.parse("fp4", store="halves").store == "halves"
