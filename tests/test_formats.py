import math
import shutil
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmquant.errors import UsageError
from dmquant.formats import (
    NF4,
    NL4,
    SHORT_NAMES,
    FloatFormat,
    Format,
    IntFormat,
    LookupFormat,
    get_format,
    known_formats,
)

ML_DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
FLOAT_FORMATS = [FloatFormat(e, m) for e in range(1, 8) for m in range(8 - e)]
ALL_FORMATS = [*FLOAT_FORMATS, *(IntFormat(bits) for bits in range(2, 9)), NF4, NL4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-39, 2.0**-126, 3.4028234e38, -3.4028234e38]

by_name = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)


def samples(fmt: Format, count: int) -> torch.Tensor:
    """Float32 numbers where rounding is decided: around the grid, over all its binades, and any bit pattern at all."""
    rng = np.random.default_rng(0)
    linear = rng.uniform(-1.2 * fmt.max, 1.2 * fmt.max, count // 4)
    low, high = math.log2(fmt.min_positive), math.log2(fmt.max)
    binades = 2 ** rng.uniform(low - 3, high + 2, count // 2) * rng.choice([-1, 1], count // 2)
    bits = rng.integers(0, 2**32, count // 4, dtype=np.uint32).view(np.float32)
    return torch.from_numpy(np.concatenate([np.float32(part) for part in (linear, binades, bits, EDGES)]))


def ties(fmt: Format) -> torch.Tensor:
    return (fmt.values[1:] + fmt.values[:-1]) / 2


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, dtypes and shapes, with NaN equal to NaN and 0 to -0."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# --- against ml_dtypes


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_has_the_value_that_ml_dtypes_gives_it(name):
    fmt = get_format(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    expected = torch.from_numpy(codes.view(ML_DTYPES[name]).astype(np.float32))

    values = fmt.decode(torch.from_numpy(codes))

    assert same(values, expected)
    assert torch.equal(values.signbit()[~values.isnan()], expected.signbit()[~expected.isnan()])
    finite = values.isfinite()
    assert torch.equal(fmt.encode(values)[finite], torch.from_numpy(codes)[finite])
    assert torch.equal(fmt.values, expected[expected.isfinite()].unique())
    assert fmt.max == float(ml_dtypes.finfo(ML_DTYPES[name]).max)
    assert fmt.min_positive == float(ml_dtypes.finfo(ML_DTYPES[name]).smallest_subnormal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ML_DTYPES)
def test_rounding_and_codes_equal_ml_dtypes(name, dtype):
    fmt = get_format(name)
    x = torch.cat([samples(fmt, 1_000_000), fmt.values, ties(fmt)]).to(dtype)
    clamped = np.clip(x.float().numpy(), -fmt.max, fmt.max)  # ml_dtypes' float8 casts overflow, ours saturate
    number = ~x.isnan()
    oracle = clamped[number.numpy()].astype(ML_DTYPES[name])

    codes, rounded = fmt.encode(x), fmt.round(x)

    assert np.array_equal(codes[number].numpy(), oracle.view(np.uint8))
    assert np.array_equal(rounded[number].float().numpy(), oracle.astype(np.float32))
    assert rounded.dtype == dtype
    assert rounded[~number].isnan().all()
    assert same(fmt.decode(codes[number], dtype), rounded[number])


# --- against a brute-force search over the definition of a minifloat


def minifloat_values(exponent: int, mantissa: int) -> np.ndarray:
    """Value of every non-negative code, straight from the definition."""
    bias = 2 ** (exponent - 1) - 1
    fields = [(e, k) for e in range(2**exponent) for k in range(2**mantissa)]
    return np.array([2.0 ** (max(e, 1) - bias) * ((e > 0) + k / 2**mantissa) for e, k in fields])


def brute_force_codes(x: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Code of the nearest of `positive` to |x|; of two equally near, the even code."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), positive[-1])
    distance = np.abs(magnitude[:, None] - positive)
    codes = np.arange(len(positive))
    preference = np.where(distance == distance.min(axis=1, keepdims=True), 2 - codes % 2, 0)
    return preference.argmax(axis=1)


@pytest.mark.parametrize(
    "fmt", [fmt for fmt in FLOAT_FORMATS if fmt.name not in ("fp8_e4m3", "fp8_e5m2")], ids=lambda fmt: fmt.name
)
def test_float_formats_equal_brute_force(fmt):
    positive = minifloat_values(fmt.exponent, fmt.mantissa)
    assert np.array_equal(fmt.values.numpy(), np.concatenate([-positive[:0:-1], positive]))
    assert (fmt.max, fmt.min_positive) == (positive[-1], positive[1])

    x = torch.cat([samples(fmt, 8_000), fmt.values, ties(fmt), 2 * torch.tensor([fmt.max, -fmt.max])])
    x = x[~x.isnan()]
    nearest = brute_force_codes(x.numpy(), positive)
    sign = x.signbit().numpy()

    assert np.array_equal(fmt.encode(x).numpy(), nearest + (sign << (fmt.bits - 1)))
    assert np.array_equal(fmt.round(x).numpy(), np.where(sign, -1, 1) * positive[nearest])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_int_formats_are_twos_complement(bits, dtype):
    fmt = IntFormat(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert fmt.values.tolist() == list(range(low, high + 1))
    assert fmt.max == high

    x = torch.cat([samples(fmt, 20_000), fmt.values, ties(fmt)]).to(dtype)
    x = x[~x.isnan()]
    nearest = np.clip(np.rint(x.double().numpy()), low, high).astype(np.int64)

    assert np.array_equal(fmt.encode(x).numpy(), nearest % 2**bits)
    assert same(fmt.round(x), torch.from_numpy(nearest).to(dtype))
    assert same(fmt.decode(fmt.encode(x), dtype), fmt.round(x))


# --- written out by hand


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("fp4_e2m1", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0], [0, 1, 1, 2, 2, 4, 4, 6, 6]),
        ("fp4_e1m2", [0.25, 0.75, 1.25, 1.75, 2.25, 3.25, 9.0], [0, 1, 1, 2, 2, 3, 3.5]),
        ("fp4_e3m0", [0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0, 99.0], [0, 0.5, 0.5, 2, 2, 8, 8, 16]),
        ("fp8_e4m3", [464.0, 500.0, 2.0**-10, 3 * 2.0**-10], [448, 448, 0, 2.0**-8]),
        ("int4", [0.5, 1.5, -0.5, -7.5, -8.5, 7.5], [0, 2, 0, -8, -8, 7]),
    ],
)
def test_ties_go_to_the_even_code(name, x, expected):
    fmt = get_format(name)
    assert fmt.round(torch.tensor(x)).tolist() == expected
    if isinstance(fmt, FloatFormat):
        assert fmt.round(-torch.tensor(x)).tolist() == [-value for value in expected]


def test_formats_have_the_published_grids():
    assert get_format("fp4_e2m1").values[7:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert get_format("fp4_e1m2").values[7:].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert get_format("fp4_e3m0").values[7:].tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert [get_format(name).max for name in ("fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e3m4")] == [
        7.5,
        28,
        448,
        57344,
        31,
    ]


def test_small_formats_are_exact_in_fp8_e4m3():
    fp8 = get_format("fp8_e4m3")
    for name in ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e2m3", "fp6_e3m2", "int4"):
        values = get_format(name).values
        assert torch.equal(fp8.round(values), values), name


# --- what holds for every format


@by_name
def test_constants_agree_with_the_values(fmt):
    assert isinstance(fmt, Format)
    assert fmt.values.dtype == torch.float32
    assert (fmt.values.diff() > 0).all()
    assert fmt.values.max() == np.float32(fmt.max)
    assert fmt.values[fmt.values > 0].min() == np.float32(fmt.min_positive)
    assert len(fmt.values) <= 2**fmt.bits
    assert fmt.encode(fmt.values).int().max() < 2**fmt.bits
    assert torch.equal(fmt.decode(fmt.encode(fmt.values)), fmt.values)
    assert torch.equal(fmt.round(fmt.values), fmt.values)


@by_name
def test_infinities_saturate_and_nan_stays(fmt):
    inf = torch.tensor([-math.inf, math.inf])
    ends = torch.stack([fmt.values.min(), fmt.values.max()])
    assert torch.equal(fmt.round(inf), ends)
    assert torch.equal(fmt.decode(fmt.encode(inf)), ends)
    assert all(torch.equal(side, ends) for side in fmt.neighbours(inf))
    for dtype in DTYPES:
        nan = torch.tensor([math.nan], dtype=dtype)
        assert fmt.round(nan).isnan().all()
        assert all(side.isnan().all() for side in fmt.neighbours(nan))
        assert fmt.encode(nan).item() == {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E}.get(fmt.name, 0)


@by_name
def test_a_nan_or_infinity_leaves_its_surroundings_alone(fmt):
    x = samples(fmt, 1000)
    finite = x.isfinite()
    assert torch.equal(fmt.round(x)[finite], fmt.round(x[finite]))
    assert torch.equal(fmt.encode(x)[finite], fmt.encode(x[finite]))


@by_name
def test_dtype_shape_and_input_are_kept(fmt):
    base = torch.linspace(-2, 2, 24).reshape(4, 6)
    for dtype in DTYPES:
        for x in (base.to(dtype), base.to(dtype).t(), base.to(dtype)[:, ::2], base.to(dtype)[0, 0], base.to(dtype)[:0]):
            before = x.clone()
            for result in (fmt.round(x), fmt.step(x), *fmt.neighbours(x), fmt.decode(fmt.encode(x), dtype)):
                assert result.dtype == dtype
                assert result.shape == x.shape
            assert fmt.encode(x).dtype == torch.uint8
            assert torch.equal(fmt.round(x), fmt.round(x.contiguous()))
            assert torch.equal(x, before)


@by_name
def test_results_carry_no_gradient_and_straight_through_works(fmt):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    for result in (fmt.round(x), fmt.step(x), *fmt.neighbours(x), fmt.encode(x), fmt.decode(fmt.encode(x))):
        assert not result.requires_grad
    (x + (fmt.round(x) - x).detach()).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@by_name
def test_values_do_not_depend_on_torch_defaults(fmt):
    expected = fmt.values
    torch.set_default_dtype(torch.bfloat16)  # as diffusers' from_pretrained does while it builds a model
    try:
        with torch.device("meta"):
            assert same(fmt.values, expected)
            assert same(fmt.round(expected), expected)
            assert same(fmt.decode(fmt.encode(expected)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


floats = st.lists(st.floats(-40, 40, width=32) | st.floats(width=32, allow_nan=False), min_size=1, max_size=50)
formats = st.sampled_from(ALL_FORMATS)


@given(formats, floats)
@settings(deadline=None, max_examples=300)
def test_round_is_idempotent_monotone_and_what_the_codes_say(fmt, numbers):
    x = torch.tensor(numbers, dtype=torch.float32).sort().values
    rounded = fmt.round(x)
    assert torch.equal(fmt.round(rounded), rounded)
    assert (rounded.diff() >= 0).all()
    assert torch.isin(rounded, fmt.values).all()
    assert torch.equal(fmt.decode(fmt.encode(x)), rounded)


@given(formats, floats)
@example(FloatFormat(1, 0), [2.0**-149, -(2.0**-149), 0.0])
@settings(deadline=None, max_examples=300)
def test_neighbours_are_adjacent_values_around_x(fmt, numbers):
    x = torch.tensor(numbers, dtype=torch.float32)
    values = fmt.values
    inside = x.clamp(values.min(), values.max())
    lo, hi = fmt.neighbours(x)
    assert ((lo <= inside) & (inside <= hi)).all()
    apart = torch.searchsorted(values, hi) - torch.searchsorted(values, lo)
    assert torch.isin(lo, values).all()
    assert torch.isin(hi, values).all()
    assert torch.equal(apart, (~torch.isin(inside, values)).long())
    rounded = fmt.round(x)
    assert ((rounded == lo) | (rounded == hi)).all()
    assert torch.equal(fmt.step(x)[apart == 1], (hi - lo)[apart == 1])


@by_name
def test_step_on_a_value_is_the_distance_to_the_next_one_outwards(fmt):
    positive = fmt.values[fmt.values >= 0]
    assert torch.equal(fmt.step(positive[:-1]), positive.diff())
    assert torch.equal(fmt.step(torch.tensor([2 * fmt.max, math.inf])), fmt.step(positive[-1:]).expand(2))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2", "int8"])
def test_half_precision_neighbours_are_those_of_the_same_numbers(name):
    fmt = get_format(name)
    for dtype in (torch.bfloat16, torch.float16):
        x = samples(fmt, 4000).to(dtype)
        for half, wide in zip(fmt.neighbours(x), fmt.neighbours(x.float()), strict=True):
            assert same(half.float(), wide)


# --- lookup formats


def test_lut4_is_the_normal_float_of_qlora():
    quantile = NormalDist().inv_cdf
    offset = 0.9677083  # of bitsandbytes' create_normal_map, which made the published table
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*negative, 0.0, *positive]) / quantile(offset)
    assert np.abs(NF4.values.numpy() - expected).max() < 1e-6
    assert (NF4.bits, NF4.max, NF4.encode(torch.tensor([-1.0, 0.0, 1.0])).tolist()) == (4, 1.0, [0, 7, 15])


@pytest.mark.parametrize("fmt", [NF4, NL4, LookupFormat("uneven", (-3.0, -0.1, 0.7, 0.701, 90.0))])
def test_lookup_is_the_nearest_value_by_all_distances(fmt):
    values = fmt.values.double().numpy()
    middles = (values[:-1] + values[1:]) / 2
    x = np.concatenate([samples(fmt, 5000).numpy(), np.float32(values), np.float32(middles)])
    x = x[np.abs(x) < 1e6]  # beyond, float64 holds no difference of distances
    distances = np.abs(x.astype(np.float64)[:, None] - values)
    tied = distances == distances.min(1, keepdims=True)
    even = (tied & (np.arange(len(values)) % 2 == 0)).argmax(1)
    expected = np.where(tied.sum(1) > 1, even, tied.argmax(1))
    assert np.array_equal(fmt.encode(torch.tensor(x)).numpy(), expected)


def test_lookup_breaks_ties_to_the_even_index():
    fmt = LookupFormat("thirds", (-1.0, 0.0, 1.0, 3.0, 4.0))
    assert fmt.encode(torch.tensor([-0.5, 0.5, 2.0, 3.5])).tolist() == [0, 2, 2, 4]
    assert fmt.bits == 3


def test_lookup_of_a_float_format_is_that_format():
    fmt = get_format("fp6_e3m2")
    lookup = LookupFormat("copy", tuple(fmt.values.tolist()))
    x = samples(fmt, 40_000)
    x = x[~torch.isin(x, ties(fmt))]  # the two number their codes differently
    for dtype in DTYPES:
        assert same(lookup.round(x.to(torch.float32)).to(dtype), fmt.round(x).to(dtype))
    lows, highs = zip(lookup.neighbours(x), fmt.neighbours(x), strict=True)
    assert same(*lows)
    assert same(*highs)


@pytest.mark.parametrize("table", [(1.0,), (0.0, 0.0), (1.0, 0.0), (0.0, math.inf), tuple(range(257))])
def test_lookup_refuses_a_bad_table(table):
    with pytest.raises(ValueError, match="table of format 'bad'"):
        LookupFormat("bad", table)


# --- names


def test_every_known_name_gives_the_format_of_that_name():
    for name in known_formats():
        assert get_format(name).name == name
        assert get_format(name.upper()) is get_format(name)
    for short, name in SHORT_NAMES.items():
        assert get_format(short) is get_format(name)
    assert get_format("fp5_e3m1") == FloatFormat(3, 1)
    assert {"fp4_e2m1", "fp6_e2m3", "fp8_e4m3", "int2", "int8", "lut4"} <= set(known_formats())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp44", "unknown format 'fp44': did you mean 'fp4'? `dmquant formats` lists them"),
        ("int4x", "did you mean 'int4'"),
        ("", "unknown format ''"),
        ("fp4_e2m2", "1 sign + 2 exponent + 2 mantissa bits are 5, not 4"),
        ("fp16_e5m10", "has 16 bits; formats have at most 8"),
        ("fp4_e0m3", "needs an exponent bit"),
        ("int1", "'int2' to 'int8'"),
        ("int16", "'int2' to 'int8'"),
    ],
)
def test_a_wrong_name_is_one_line_of_advice(name, message):
    with pytest.raises(UsageError) as error:
        get_format(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- other ways to run


def everything(fmt: Format, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes = fmt.encode(x)
    return (fmt.round(x), codes, fmt.decode(codes, x.dtype), *fmt.neighbours(x), fmt.step(x))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["fp4_e2m1", "fp4_e3m0", "fp8_e5m2", "int4", "lut4"])
def test_compiled_equals_eager(name):
    fmt = get_format(name)
    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True)
    x = torch.cat([samples(fmt, 4000), ties(fmt)])
    for eager, other in zip(everything(fmt, x), compiled(fmt, x), strict=True):
        assert same(eager, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by_name
def test_cuda_equals_cpu(fmt):
    for dtype in DTYPES:
        x = torch.cat([samples(fmt, 100_000), ties(fmt)]).to(dtype)
        for cpu, cuda in zip(everything(fmt, x), everything(fmt, x.cuda()), strict=True):
            assert cuda.is_cuda
            assert same(cpu, cuda.cpu())
