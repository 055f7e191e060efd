"""Scale stores: how far powers of two go, and a store that comes from outside."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant import stores
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.layers import QuantLinear, quantize_layer
from dmquant.operands import integer_weight
from dmquant.packing import unpack
from dmquant.qtensor import WeightSpec, quantize_tensor
from dmquant.recipe import Recipe
from dmquant.scaling import fit_absmax, fit_mse


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


MULTIPLES = [name for name, store in stores.STORES.items() if store.factors]
FEW_BITS = ["fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e2m3", "int2", "int3", "int4", "int5", "int6"]


@pytest.mark.parametrize("store", MULTIPLES)
@pytest.mark.parametrize("format", FEW_BITS)
def test_whole_multiples_make_a_row_integers_times_one_float(store, format):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 96)
    for rule in ("absmax", "mse"):
        q = quantize_tensor(weight, format, "group:16", rule, store)
        factors, fmt = stores.STORES[store].factors(q.spec.fmt), q.spec.fmt
        assert set(q.scales.stored.unique().tolist()) <= set(factors)
        integers = q.dequantize().double() / (q.scales.base.double() * fmt.min_positive)
        assert torch.equal(integers, integers.round())
        assert integers.abs().max() <= factors[-1] * fmt.values.abs().max() / fmt.min_positive


@pytest.mark.parametrize("granularity", ["group:16", "channel", "tensor"])
@pytest.mark.parametrize("store", MULTIPLES)
def test_kernels_are_given_the_integers_and_factors_of_a_weight(store, granularity):
    layer = quantize_layer(nn.Linear(48, 12), WeightSpec.parse("int4", granularity, "mse", store), None)
    weight, codes = integer_weight(layer), unpack(layer.qweight, 4, 48).int()
    factors = weight.factors.repeat_interleave(48 // weight.factors.shape[1], 1).int()
    integers = weight.values[codes] * factors
    assert integers.abs().max() <= weight.largest <= 64
    assert torch.equal(weight.tables()[factors, codes].int(), integers)
    assert torch.equal(integers * weight.scale.view(-1, 1), layer.dequantize(torch.float32))


def test_sums_of_two_products_with_8_bits_of_int_scales_fit_in_16():
    """docs/formats.md names these factors."""
    factors = {name: stores.STORES["int"].factors(get_format(name))[-1] for name in FEW_BITS}
    assert factors == dict(zip(FEW_BITS, (5, 9, 1, 1, 16, 16, 8, 4, 2), strict=True))
    for name in FEW_BITS:
        fmt = get_format(name)
        assert 2 * 255 * factors[name] * fmt.values.abs().max() / fmt.min_positive < 2**15


def test_e2m1_times_its_factors_is_exact_in_fp8_too():
    fmt = get_format("fp4_e2m1")
    products = fmt.values * torch.tensor(stores.STORES["int"].factors(fmt)).view(-1, 1)
    assert torch.equal(products.to(torch.float8_e4m3fn).float(), products)


@pytest.mark.parametrize("store", MULTIPLES)
def test_no_other_base_of_a_row_is_much_better_than_the_one_found(store):
    groups = torch.randn(12, 24, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, 24).view(-1, 1)
    fmt, kind = get_format("int4"), stores.STORES[store]

    def error(scale):
        return (fmt.round(groups / scale.unsqueeze(-1)) * scale.unsqueeze(-1) - groups).square().sum(-1)

    found, absmax = fit_mse(groups, fmt, store), fit_absmax(groups, fmt, store)
    least = error(found.decode()).sum(-1)
    bases = [absmax.base * 2.0 ** (step / 40) for step in range(-60, 30)]
    others = [
        torch.stack([error((base * factor).expand(12, 24)) for factor in kind.factors(fmt)]).amin(0).sum(-1)
        for base in bases
    ]
    assert (least <= 1.1 * torch.stack(others).amin(0)).all()
    assert least.sum() < 0.9 * error(absmax.decode()).sum()


def test_whole_multiples_lose_little_more_than_nvfp4s_scales():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def lost(format, store):
        q = quantize_tensor(weight, format, "group:16", "mse", store)
        return (q.dequantize() - weight).square().mean()

    nvfp4 = lost("fp4", "e4m3")
    assert lost("int4", "int") < 1.05 * nvfp4
    assert lost("fp4_e1m2", "int") < 1.2 * nvfp4
    assert lost("fp4", "int") < 1.35 * nvfp4 < lost("fp4", "pow2:2")


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


ASYMMETRIC = ["nl4", "int4", "int3"]


@pytest.mark.parametrize("format", ASYMMETRIC)
def test_scales_of_either_sign_treat_a_weight_and_its_negative_alike(format):
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    q, mirrored = (quantize_tensor(each, format, "group:32", "mse", "e3m4") for each in (weight, -weight))
    assert torch.equal(q.dequantize(), -mirrored.dequantize())
    assert {False, True} == set((q.scale < 0).flatten().tolist())


@settings(max_examples=25, deadline=None)
@given(
    format=st.sampled_from([*ASYMMETRIC, "fp4", "lut4"]),
    size=st.sampled_from([16, 32]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_the_search_of_e3m4_finds_the_least_error_of_all_it_may_store(format, size, spread, seed):
    """In numpy, in float64: every multiple of absmax of both signs, rounded to E3M4, with the nearest of all values."""
    weight = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-spread, 0, 3).view(-1, 1)
    q = quantize_tensor(weight, format, f"group:{size}", "mse", "e3m4")
    fmt, small = get_format(format), get_format("fp8_e3m4")
    values, stored = fmt.values.double().numpy(), small.values.double().numpy()
    groups, base = weight.view(-1, size).double().numpy(), q.scales.base.item()
    errors = []
    for multiple in (1.0, *stores.FINE_SEARCH):
        ratio = multiple * np.abs(groups).max(1) / fmt.max / base
        magnitude = stored[np.abs(np.maximum(ratio, small.min_positive)[:, None] - stored).argmin(1)]
        for scale in (base * magnitude, -base * magnitude):
            multiples = values * scale[:, None]
            errors.append((np.abs(groups[..., None] - multiples[:, None]).min(-1) ** 2).sum(1))
    lost = (q.dequantize() - weight).double().view(-1, size).square().sum(1).numpy()
    assert (lost <= np.min(errors, 0) * (1 + 1e-4) + 1e-30).all()


def test_the_data_free_scales_lose_little_at_their_bits():
    """Relative errors of normal weights, beside FP4 in groups of 64 and NF4 as bitsandbytes has it."""
    weight, recipe = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)), Recipe.load("rtn")

    def error(*spec):
        return ((quantize_tensor(weight, *spec).dequantize() - weight).square().sum() / weight.square().sum()).item()

    own = recipe.weights, recipe.granularity, recipe.scale, recipe.store
    assert 8 * quantize_tensor(weight, *own).nbytes / weight.numel() == pytest.approx(4.25, abs=1e-3)
    assert error(*own) < 0.6 * error("fp4", "group:64", "mse", "bf16")
    assert error("nl4", "group:64", "mse", "e3m4") < 0.85 * error("lut4", "group:64", "absmax", "fp32")
    assert error("nl4", "group:16", "mse", "e3m4") < 0.65 * error("nvfp4", "group:16", "mse")
    assert error("nl3", "group:16", "mse", "e3m4") < 0.7 * error("int3", "group:16", "mse", "e4m3")


def test_scales_of_both_signs_are_no_whole_multiples():
    half = torch.linspace(-0.3, 1, 16)
    layer = nn.Linear(32, 2, bias=False)
    layer.weight.data = torch.stack([torch.cat([half, -half]), torch.cat([half, half])])
    quantized = quantize_layer(layer, WeightSpec.parse("int4", "group:16", "mse", "e3m4"), None)
    assert (quantized.scales.decode()[0].sign() * torch.tensor([-1, 1])).sum().abs() == 2
    with pytest.raises(ValueError, match="no small multiples of one"):
        integer_weight(quantized)


@pytest.mark.parametrize(("format", "gain"), [("nl4", 0.01), ("nl3", 0.02)])
@pytest.mark.parametrize("size", [16, 32])
def test_no_table_fits_normal_groups_with_scales_of_either_sign_much_better(size, format, gain):
    """A step of Lloyd's algorithm, with the scales that the search gives, gains less than this."""
    weight = torch.randn(1024, 256, generator=torch.Generator().manual_seed(size))
    quantized = quantize_tensor(weight, format, f"group:{size}", "mse", "e3m4")
    scale, x = quantized.scale.repeat_interleave(size, 1), weight
    code = get_format(format).encode(x / scale).flatten().long()
    mass = torch.zeros(2 ** get_format(format).bits).index_add_(0, code, scale.square().flatten())
    moved = torch.zeros(len(mass)).index_add_(0, code, (x * scale).flatten()) / mass
    error = (quantized.dequantize() - x).square().sum()
    assert (moved[code].view(x.shape) * scale - x).square().sum() > (1 - gain) * error
