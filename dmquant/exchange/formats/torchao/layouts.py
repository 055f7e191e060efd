"""The tensors of torchao 0.18 in which our layers fit: how each is told in a file's header, and its parts.

torchao/prototype/safetensors: a weight `a.weight` is stored as its parts `a._weight_qdata`, `a._weight_scale`, ..., and
the header has its class and attributes as JSON under `a.weight`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.exchange.layers import block_format, bytes_of, check_class, described, float_scale, kind_of, rounded_by
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import Entry
from dmquant.formats import IntFormat
from dmquant.gpu.blocked import in_tiles, to_blocked
from dmquant.layers import QuantLinear
from dmquant.operands import integer_weight
from dmquant.packing import unpack
from dmquant.qtensor import WeightSpec
from dmquant.stores import get_store

DTYPE = "bfloat16"
"""What weights decode to, unless `dtype` says otherwise when they are loaded."""
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
ELEMENTS = {"mxfp4": ("float4_e2m1fn_x2", torch.uint8), "mxfp8": ("float8_e4m3fn", torch.float8_e4m3fn)}


@dataclass(frozen=True)
class Layout:
    """A weight as torchao has it."""

    kind: str
    """What people call it."""
    type: str
    """The class of the tensor."""
    attributes: Mapping[str, Any]
    parts: Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration by which torchao would make such tensors itself."""

    def header(self) -> dict[str, Any]:
        """What the file's header says of it."""
        return {"_type": self.type, "_data": dict(self.attributes), "_tensor_data_names": list(self.parts)}

    def entries(self, name: str) -> list[Entry]:
        """Its parts, for the layer of this name."""
        return [Entry(f"{name}._weight_{part}", *what) for part, what in self.parts.items()]


def named(kind: str, value: Any) -> dict[str, Any]:
    """A value as torchao writes it with the name of its class."""
    return {"_type": kind, "_data": value}


def versioned(kind: str, **values: Any) -> dict[str, Any]:
    """A configuration as torchao writes it: of version 1, unless it says otherwise."""
    return {"_type": kind, "_version": values.pop("version", 1), "_data": values}


AUTO = named("KernelPreference", "AUTO")
SUMS = named("Float8MMConfig", {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False})
LEAST = 1e-12  # the largest of an FP8 input: without it a token of zeros, as SD3's in place of T5's, becomes NaN
ROW, TENSOR = named("PerRow", {"dim": -1}), named("PerTensor", {})


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why torchao cannot take a linear layer in these formats; None where it can."""
    block = block_format(spec)
    if block in ("nvfp4", *ELEMENTS):
        why = check_class(layer, spec.granularity.size)
    elif spec.fmt.name in FLOAT8 or isinstance(spec.fmt, IntFormat):
        size = spec.granularity.size or 1
        why = check_class(layer, size)
        if why is None and spec.split and (spec.granularity.kind != "group" or spec.split % size):
            why = "has scales of their own for two halves of its input"
    else:
        why = f"has weights in {described(spec)}"
    if why is None and kind_of(activations) not in _inputs(block, spec):
        given = kind_of(activations) or "16 bits"
        return f"has inputs in {given}, by which torchao multiplies no weights in {described(spec)}"
    if why is None and activations is not None and layer.out_features % 16:
        return (
            f"has {layer.out_features} outputs, no multiple of 16, for which its kernels ask where inputs are rounded"
        )
    return why


def _inputs(block: str | None, spec: WeightSpec) -> tuple[str | None, ...]:
    """The inputs by which weights in these formats are multiplied; None for such as are not rounded."""
    if block == "nvfp4":
        return None, "nvfp4", "static nvfp4"
    if block in ELEMENTS:
        return ("mxfp4",) if block == "mxfp4" else (None, "mxfp8")
    if spec.fmt.name == "fp8_e4m3" and spec.granularity.kind != "group":
        return None, f"fp8_e4m3 a {'token' if spec.granularity.kind == 'channel' else 'tensor'}"
    whole = spec.granularity.kind == "channel" or get_store(spec.store).factors
    return (None, "int8 a token") if isinstance(spec.fmt, IntFormat) and whole and spec.split is None else (None,)


def layout(source: Source, name: str) -> Layout:
    """A layer as torchao has it; for one that `refuses` has no word against."""
    layer = source.layers[name]
    block = block_format(layer.weight_spec)
    if block == "nvfp4":
        return _nvfp4(source, name, layer)
    if block in ELEMENTS and layer.activations is not None:
        return _mx(source, name, layer, block)
    if layer.weight_spec.fmt.name in FLOAT8:
        return _float8(source, name, layer)
    return _int8(source, name, layer)


def _nvfp4(source: Source, name: str, layer: QuantLinear) -> Layout:
    """Block scales in the order of Blackwell's tensor cores where these multiply."""
    rows, columns = layer.weight_shape
    rounded, dynamic = layer.activations is not None, not layer.is_static
    inputs = {
        "block_size": 16,
        "is_swizzled_scales": True,
        "use_triton_kernel": False,
        "use_dynamic_per_tensor_scale": dynamic,
    }
    attributes = {
        "is_swizzled_scales": rounded,
        "use_triton_kernel": False,
        "act_quant_kwargs": named("QuantizeTensorToNVFP4Kwargs", inputs) if rounded else None,
        "block_size": 16,
        "orig_dtype": named("torch.dtype", DTYPE),
    }
    base = bytes_of(source, f"{name}.scale_base", torch.float32)
    parts = {"per_tensor_scale": (torch.float32, (), lambda: base().reshape(()))}
    if not dynamic:
        fixed = bytes_of(source, f"{name}.input_scale", torch.float32)
        parts["act_per_tensor_scale"] = (torch.float32, (), lambda: fixed().reshape(()))
    parts |= {
        "qdata": (torch.uint8, (rows, columns // 2), lambda: source.tensor(f"{name}.qweight")),
        "scale": _block_scales(source, name, layer, torch.float8_e4m3fn, rounded),
    }
    if not rounded:
        config = versioned("NVFP4WeightOnlyConfig", use_dynamic_per_tensor_scale=True)
        return Layout("nvfp4", "NVFP4Tensor", attributes, parts, config)
    options = {"use_triton_kernel": False, "use_dynamic_per_tensor_scale": dynamic, "step": None}
    config = versioned("NVFP4DynamicActivationNVFP4WeightConfig", **options)
    return Layout(f"nvfp4 x {kind_of(layer.activations)}", "NVFP4Tensor", attributes, parts, config)


def _block_scales(source: Source, name: str, layer: QuantLinear, dtype: torch.dtype, swizzled: bool):
    """Scales of blocks as stored, or in tiles of 32 rows of 16."""
    rows, columns = layer.weight_spec.scale_shape(layer.weight_shape)
    plain = bytes_of(source, f"{name}.scale", torch.uint8)
    if not swizzled:
        return dtype, (rows, columns), lambda: plain().view(dtype)
    tall, wide = in_tiles(rows, columns)
    shape = tall // 4, 4 * wide
    return dtype, shape, lambda: to_blocked(plain()).view(dtype).view(shape)


def _mx(source: Source, name: str, layer: QuantLinear, block: str) -> Layout:
    """Inputs by torchao's own rule where that was emulated, by the MX specification's, as ours, where it was not."""
    element, stored = ELEMENTS[block]
    rows, columns = layer.weight_shape
    inputs = {
        "elem_dtype": named("torch.dtype", element),
        "block_size": 32,
        "scaling_mode": named(
            "ScaleCalculationMode", "RCEIL" if rounded_by(layer.activations) == "torchao" else "FLOOR"
        ),
        "kernel_preference": AUTO,
        "is_swizzled_scales": True,
    }
    attributes = {
        "elem_dtype": inputs["elem_dtype"],
        "block_size": 32,
        "orig_dtype": named("torch.dtype", DTYPE),
        "kernel_preference": AUTO,
        "act_quant_kwargs": named("QuantizeTensorToMXKwargs", inputs),
        "is_swizzled_scales": True,
    }
    parts = {
        "qdata": (
            stored,
            (rows, columns // 2 if block == "mxfp4" else columns),
            bytes_of(source, f"{name}.qweight", stored),
        ),
        "scale": _block_scales(source, name, layer, torch.float8_e8m0fnu, True),
    }
    options = {
        "block_size": 32,
        "activation_dtype": inputs["elem_dtype"],
        "weight_dtype": inputs["elem_dtype"],
        "kernel_preference": AUTO,
        "scaling_mode": inputs["scaling_mode"],
    }
    return Layout(
        f"{block} x {block}", "MXTensor", attributes, parts, versioned("MXDynamicActivationMXWeightConfig", **options)
    )


def _float8(source: Source, name: str, layer: QuantLinear) -> Layout:
    """Scales in float32 of the tensor, of each row, or of blocks of a row."""
    spec, (rows, columns) = layer.weight_spec, layer.weight_shape
    dtype = FLOAT8[spec.fmt.name]
    per = TENSOR if spec.granularity.kind == "tensor" else ROW
    dynamic = layer.activations is not None
    inputs = {
        "float8_dtype": named("torch.dtype", "float8_e4m3fn"),
        "granularity": per,
        "mm_config": SUMS,
        "hp_value_lb": LEAST,
        "hp_value_ub": None,
        "kernel_preference": AUTO,
    }
    shape = spec.scale_shape(layer.weight_shape)
    attributes = {
        "block_size": [rows // shape[0], columns // shape[1]],
        "mm_config": SUMS if dynamic else None,
        "act_quant_kwargs": named("QuantizeTensorToFloat8Kwargs", inputs) if dynamic else None,
        "kernel_preference": AUTO,
        "dtype": named("torch.dtype", DTYPE),
    }
    parts = {
        "qdata": (dtype, (rows, columns), bytes_of(source, f"{name}.qweight", dtype)),
        "scale": (torch.float32, shape, float_scale(source, name)),
    }
    size = spec.granularity.size
    kind = {"tensor": "fp8 a tensor", "channel": "fp8 a row"}.get(spec.granularity.kind, f"fp8 in groups of {size}")
    per = versioned(per["_type"], **per["_data"])
    weights = named("torch.dtype", str(dtype).removeprefix("torch."))
    if not dynamic:
        config = versioned("Float8WeightOnlyConfig", version=2, weight_dtype=weights, granularity=per)
        return Layout(kind, "Float8Tensor", attributes, parts, config)
    options = {"activation_dtype": weights, "weight_dtype": weights, "granularity": [per, per]}
    options["activation_value_lb"] = LEAST
    config = versioned("Float8DynamicActivationFloat8WeightConfig", version=2, **options)
    return Layout(f"{kind} x fp8", "Float8Tensor", attributes, parts, config)


def _int8(source: Source, name: str, layer: QuantLinear) -> Layout:
    """Integers of any bits in a byte each, with scales in float32; where int8 inputs multiply, one for each row."""
    spec, (rows, columns) = layer.weight_spec, layer.weight_shape
    dynamic = layer.activations is not None
    inputs = {"granularity": ROW, "mapping_type": named("MappingType", "SYMMETRIC"), "reduce_range": False}
    shape = (rows, 1) if dynamic else spec.scale_shape(layer.weight_shape)
    attributes = {
        "act_quant_kwargs": named("QuantizeTensorToInt8Kwargs", inputs) if dynamic else None,
        "reduce_range": False,
        "block_size": [rows // shape[0], columns // shape[1]],
        "dtype": named("torch.dtype", DTYPE),
    }

    def plain() -> Tensor:
        codes = unpack(source.tensor(f"{name}.qweight"), spec.fmt.bits, columns)
        return codes.view(torch.int8) if spec.fmt.bits == 8 else spec.fmt.decode(codes).to(torch.int8)

    def whole() -> Tensor:
        filled = source.layer(name)
        factors = integer_weight(filled).factors.to(torch.int8)
        return plain() * factors.repeat_interleave(columns // factors.shape[1], 1)

    scale = (lambda: integer_weight(source.layer(name)).scale.T.contiguous()) if dynamic else float_scale(source, name)
    parts = {
        "qdata": (torch.int8, (rows, columns), whole if dynamic else plain),
        "scale": (torch.float32, shape, scale),
    }
    row = versioned("PerRow", dim=-1)
    if dynamic:
        config = versioned("Int8DynamicActivationInt8WeightConfig", version=2, granularity=row)
        return Layout(f"{spec.fmt.name} x int8", "Int8Tensor", attributes, parts, config)
    per = versioned("PerGroup", group_size=spec.granularity.size) if spec.granularity.size else row
    config = versioned("Int8WeightOnlyConfig", version=2, granularity=per)
    return Layout(f"{spec.fmt.name} in bytes", "Int8Tensor", attributes, parts, config)
