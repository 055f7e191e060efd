"""GGUF's header and the fits of its blocks, without the package gguf (test_readers_gguf.py has what takes it)."""

import math
import struct
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.errors import UsageError, UserError
from dmquant.exchange.formats import writable
from dmquant.exchange.formats.gguf import blocks, fitting, header
from dmquant.pipelines.models.opening import find, open_foreign, open_source
from dmquant.recipe import Recipe
from tests.exchange.gguf_files import Q8_0, written

STRING, UINT32, INT32, ARRAY = 8, 4, 5, 9


@pytest.fixture
def whole(tmp_path):
    """A file with one layer in Q8_0, flattened to a row, and its bias."""
    scales = struct.pack("<e", 0.5) + bytes(range(32)), struct.pack("<e", 2.0) + bytes([255] * 32)
    tensors = {"a.weight": ((64,), Q8_0, b"".join(scales)), "a.bias": ((2,), 0, struct.pack("<2f", 1, 2))}
    shape = struct.pack("<IQ2i", INT32, 2, 2, 32)
    return written(tmp_path / "a.gguf", tensors, {header.SHAPES + "a.weight": (ARRAY, shape)})


def test_a_header_names_what_is_in_the_file(whole):
    found = find(whole)
    assert {name: (one.dtype, one.shape, one.end - one.begin) for name, one in found.tensors.items()} == {
        "a.weight": ("Q8_0", (2, 32), 68),
        "a.bias": ("F32", (2,), 8),
    }
    assert found.metadata["general.architecture"] == "test"
    assert torch.equal(found.tensor("a.bias"), torch.tensor([1.0, 2.0]))
    opened = open_foreign(whole)
    assert opened.format.name == "gguf"
    assert [(one.name, one.format, one.shape, one.nbytes) for one in opened.layers.values()] == [
        ("a", "q8_0", (2, 32), 68)
    ]
    assert opened.rest == ("a.bias",)


def test_a_file_cut_anywhere_is_refused(whole):
    content = whole.read_bytes()
    for length in range(4, len(content) - 32, 7):
        whole.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"truncated|version"):
            find(whole)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(4, 200), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(tmp_path_factory, place, value):
    scales = struct.pack("<e", 0.5) + bytes(32)
    path = tmp_path_factory.mktemp("damaged") / "a.gguf"
    written(path, {"a.weight": ((1, 32), Q8_0, scales), "b.weight": ((32, 2), Q8_0 - 8, bytes(256))}, {})
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    try:
        tensors = find(path).tensors
    except UserError:
        return
    assert all(one.end <= len(content) for one in tensors.values())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a.weight": ((1, 48), Q8_0, bytes(68))}, r"no whole blocks of Q8_0"),
        ({"a.weight": ((1 << 40, 32), Q8_0, bytes(34))}, r"ends at byte"),
        ({"a.weight": ((1, 32), 19, bytes(34))}, r"ggml's type 19"),
        ({"a.weight": ((1, 1, 1, 1, 32), Q8_0, bytes(34))}, r"has 5 dimensions"),
        ({"a.weight": ((0, 32), Q8_0, b"")}, r"no whole blocks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, tensors, reason):
    path = written(tmp_path / "a.gguf", tensors, {})
    with pytest.raises(UserError, match=reason):
        find(path)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    shape = struct.pack("<IQ2i", INT32, 2, 3, 32)
    path = written(
        tmp_path / "a.gguf", {"a.weight": ((64,), Q8_0, bytes(68))}, {header.SHAPES + "a.weight": (ARRAY, shape)}
    )
    with pytest.raises(UserError, match=r"64 weights cannot have the shape \[3, 32\]"):
        find(path)


@pytest.mark.parametrize("name", ["a.bias", "table"])
def test_a_quantized_tensor_that_is_no_weight_is_refused(tmp_path, name):
    path = written(tmp_path / "a.gguf", {name: ((32,), Q8_0, bytes(34))}, {})
    with pytest.raises(UserError, match=f"'{name}' .*no layer's weight"):
        open_foreign(path)


def test_counts_that_no_file_could_hold_are_refused_at_once(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1 << 60) + bytes(64))
    with pytest.raises(UserError, match="entries in 88 bytes"):
        find(path)


def test_writing_takes_the_package_and_a_known_type(saved, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="unknown variant of gguf 'q4': did you mean"):
        writable("gguf:q4")
    monkeypatch.setitem(sys.modules, "gguf", None)
    source = open_source(saved(Recipe(name="int4", weights="int4")))
    with pytest.raises(UserError, match=r"pip install 'dmquant\[gguf\]'"):
        writable("gguf").export(source, tmp_path / "a.gguf", lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


@st.composite
def weights(draw, columns):
    seed, spread = draw(st.integers(0, 1 << 30)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, columns, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    x *= (spread * torch.randn(2, columns, generator=generator)).exp()
    x[:, : columns // 2] *= draw(st.sampled_from([0.0, 1.0]))
    return x, torch.rand(columns, generator=generator) + 1e-3


GRIDS = {
    "Q4_0": fitting.Symmetric(fitting.whole(-8, 7), (-8, 7)),
    "IQ4_NL": fitting.Symmetric(fitting.of_halves(blocks.IQ4_NL_LEVELS.values), (-127, 113)),
    "Q8_0": fitting.Symmetric(fitting.whole(-127, 127), (127,), (1.0,)),
}


@settings(max_examples=60, deadline=None)
@given(case=weights(32), name=st.sampled_from(sorted(GRIDS)))
def test_fitted_scales_are_stored_ones_and_lose_no_more_than_the_largest_weights_scale(case, name):
    x, cost = case
    grid = GRIDS[name]
    scale, levels = grid.fit(x, cost)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(levels, grid.codes(x, scale))
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    plain = min(float(lost(x, cost, grid, fitting.half(peak / end))) for end in grid.ends)
    assert float(lost(x, cost, grid, scale)) <= plain * 1.05 + 1e-12
    assert torch.equal(levels[(x == 0).all(-1)], torch.zeros_like(levels[(x == 0).all(-1)]))


def lost(x, cost, grid, scale):
    return (cost * (grid.codes(x, scale) * scale - x).square()).sum()


def test_levels_of_halves_are_the_nearest():
    x = torch.linspace(-150, 150, 6001)
    nearest = fitting.of_halves(blocks.IQ4_NL_LEVELS.values)
    distance = (x.unsqueeze(1) - blocks.IQ4_NL_LEVELS.values).abs().amin(1)
    assert torch.equal((nearest(x) - x).abs(), distance)


@settings(max_examples=40, deadline=None)
@given(case=weights(256), top=st.sampled_from([15, 31]))
def test_k_quants_are_whole_numbers_and_nearer_than_one_scale_for_all(case, top):
    x, cost = (one.unflatten(-1, (8, 32)) for one in case)
    found = fitting.fit_k(x, cost, top)
    for part, limit in ((found.scales, 63), (found.minima, 63), (found.codes, top)):
        assert torch.equal(part, part.round())
        assert 0 <= float(part.min()) <= float(part.max()) <= limit
    for factor in (found.d, found.dmin):
        assert torch.equal(factor, factor.half().float())
        assert float(factor.min()) >= 0
    values = found.d * found.scales * found.codes - found.dmin * found.minima
    step = fitting.half((x.amax((-2, -1), True).clamp(min=0) - x.amin((-2, -1), True).clamp(max=0)) / top)
    even = (x / fitting.positive(step)).round() * step
    error, of_one_scale = (float((cost * (one - x).square()).sum()) for one in (values, even))
    assert error <= of_one_scale * 1.01 + 1e-12 * float((cost * x.square()).sum())
    assert math.isfinite(error)
