"""Weights with `weight_scale`, `weight_scale_2` and `input_scale` beside them: the names that ModelOpt gave.

ModelOpt 0.47 writes them (export_hf_checkpoint), diffusers' bfl layers took them over. Codes of four bits lie low
nibble first, scales of blocks row by row, and values are code x block scale x `weight_scale_2`.
"""

import torch
from torch import Tensor

from dmquant.exchange.decoding import e2m1, e8m0, matrix, part, scaled, stored_bytes
from dmquant.exchange.interfaces import ForeignLayer, Found
from dmquant.exchange.layers import bytes_of, float_scale, inputs
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import DTYPES, Entry

WEIGHT, SCALE, BASE, INPUT = "weight", "weight_scale", "weight_scale_2", "input_scale"
SMOOTH, DOWN, UP = "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"
PARTS = (WEIGHT, SCALE, BASE, INPUT, SMOOTH, DOWN, UP)


def nvfp4(source: Source, name: str) -> list[Entry]:
    """Entries of a layer with NVFP4 weights: `weight` (N, K / 2), `weight_scale` (N, K / 16), `weight_scale_2` ()."""
    rows, columns = source.layers[name].weight_shape
    base = bytes_of(source, f"{name}.scale_base", torch.float32)
    scale = bytes_of(source, f"{name}.scale", torch.float8_e4m3fn)
    return [
        Entry(f"{name}.{WEIGHT}", torch.uint8, (rows, columns // 2), lambda: source.tensor(f"{name}.qweight")),
        Entry(f"{name}.{SCALE}", torch.float8_e4m3fn, (rows, columns // 16), scale),
        Entry(f"{name}.{BASE}", torch.float32, (), lambda: base().reshape(())),
    ]


def mxfp8(source: Source, name: str) -> list[Entry]:
    """Entries of a layer with MXFP8 weights: `weight` (N, K), `weight_scale` (N, K / 32), uint8 exponents."""
    rows, columns = source.layers[name].weight_shape
    scale = bytes_of(source, f"{name}.scale", torch.uint8)
    codes = bytes_of(source, f"{name}.qweight", torch.float8_e4m3fn)
    return [
        Entry(f"{name}.{WEIGHT}", torch.float8_e4m3fn, (rows, columns), codes),
        Entry(f"{name}.{SCALE}", torch.uint8, (rows, columns // 32), scale),
    ]


def bytewise(source: Source, name: str, dtype: torch.dtype) -> list[Entry]:
    """Entries of a layer with weights of a byte, `weight` (N, K), and `weight_scale` () or (N,) in float32."""
    layer = source.layers[name]
    shape = () if layer.weight_spec.granularity.kind == "tensor" else (layer.weight_shape[0],)
    scale = float_scale(source, name)
    return [
        Entry(f"{name}.{WEIGHT}", dtype, layer.weight_shape, bytes_of(source, f"{name}.qweight", dtype)),
        Entry(f"{name}.{SCALE}", torch.float32, shape, lambda: scale().reshape(shape)),
    ]


def static_input(source: Source, name: str) -> Entry:
    """The static scale of a layer's input, or the base of its block scales, `input_scale` ()."""
    scale = bytes_of(source, f"{name}.input_scale", torch.float32)
    return Entry(f"{name}.{INPUT}", torch.float32, (), lambda: scale().reshape(()))


def branch(source: Source, name: str) -> list[Entry]:
    """Entries of a layer's smoothing (K,), ones without, and of its low-rank branch, (R, K) and (N, R); bfloat16."""
    layer = source.layers[name]
    columns, parts = layer.weight_shape[1], {one.name: one for one in layer.transforms}
    rank = parts["lowrank"].rank
    smooth = bytes_of(source, f"{name}.smooth_factor", torch.bfloat16)
    given = (lambda: smooth().reshape(-1)) if "smooth" in parts else lambda: torch.ones(columns, dtype=torch.bfloat16)
    down, up = (bytes_of(source, f"{name}.lowrank_{part}", torch.bfloat16) for part in ("down", "up"))
    return [
        Entry(f"{name}.{SMOOTH}", torch.bfloat16, (columns,), given),
        Entry(f"{name}.{DOWN}", torch.bfloat16, (rank, columns), down),
        Entry(f"{name}.{UP}", torch.bfloat16, (layer.weight_shape[0], rank), up),
    ]


def names(found: Found) -> list[str]:
    """The layers of files that have scales of such names."""
    return [name.removesuffix(f".{SCALE}") for name in found.tensors if name.endswith(f".{SCALE}")]


def read(found: Found, name: str, engine: str) -> ForeignLayer:
    """One layer, by the dtypes of its weight and scales; UserError where these do not go together."""
    stored = found.tensors.get(f"{name}.{WEIGHT}")
    kind = None if stored is None else DTYPES.get(stored.dtype)
    reader = {torch.uint8: _nvfp4, torch.int8: _int8}.get(kind, _float8)
    shape, decode, format, activations = reader(found, name, engine)
    nbytes = sum(stored_bytes(found, f"{name}.{part}") for part in PARTS)
    scale = (lambda: found.tensor(f"{name}.{INPUT}").reshape(1, 1)) if f"{name}.{INPUT}" in found.tensors else None
    return ForeignLayer(name, format, shape, nbytes, decode, activations, scale)


def _static(found: Found, name: str) -> bool:
    if f"{name}.{INPUT}" not in found.tensors:
        return False
    part(found, f"{name}.{INPUT}", "F32", (), (1,))
    return True


def _nvfp4(found: Found, name: str, engine: str):
    rows, halves = matrix(found, f"{name}.{WEIGHT}", "U8")
    part(found, f"{name}.{SCALE}", "F8_E4M3", (rows, halves // 8))
    part(found, f"{name}.{BASE}", "F32", (), (1,))

    def decode() -> Tensor:
        scale = found.tensor(f"{name}.{SCALE}").float() * found.tensor(f"{name}.{BASE}").reshape(())
        return scaled(e2m1(found.tensor(f"{name}.{WEIGHT}")), scale)

    activations = inputs("nvfp4", engine, "static:1") if _static(found, name) else None
    return (rows, 2 * halves), decode, "nvfp4", activations


def _float8(found: Found, name: str, engine: str):
    shape = rows, columns = matrix(found, f"{name}.{WEIGHT}", "F8_E4M3", "F8_E5M2")
    scale = found.tensors[f"{name}.{SCALE}"]
    if scale.dtype == "U8":
        part(found, f"{name}.{SCALE}", "U8", (rows, columns // 32))
    else:
        part(found, f"{name}.{SCALE}", "F32", (), (1,), (rows,), (rows, 1))

    def decode() -> Tensor:
        stored = found.tensor(f"{name}.{SCALE}")
        blocks = e8m0(stored) if scale.dtype == "U8" else stored.reshape(-1, 1)
        return scaled(found.tensor(f"{name}.{WEIGHT}").float(), blocks)

    if scale.dtype == "U8":
        return shape, decode, "mxfp8", inputs("mxfp8", engine)
    if _static(found, name):
        return shape, decode, "fp8", inputs("fp8_e4m3", engine, "static:1", "tensor")
    return shape, decode, "fp8", inputs("fp8_e4m3", engine) if scale.shape[:1] == (rows,) else None


def _int8(found: Found, name: str, engine: str):
    shape = matrix(found, f"{name}.{WEIGHT}", "I8")
    part(found, f"{name}.{SCALE}", "F32", (), (1,), shape[:1], (shape[0], 1))

    def decode() -> Tensor:
        return scaled(found.tensor(f"{name}.{WEIGHT}").float(), found.tensor(f"{name}.{SCALE}").reshape(-1, 1))

    return shape, decode, "int8", inputs("int8", engine, "static:1", "tensor") if _static(found, name) else None
