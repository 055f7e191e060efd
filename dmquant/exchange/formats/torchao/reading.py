"""Read what torchao 0.18 writes: tensors told in the header of a file, decoded by torchao's rules."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.decoding import e2m1, e8m0, matrix, part, scaled
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found
from dmquant.exchange.layers import inputs
from dmquant.gpu.blocked import from_blocked

NAME, NAMES, PLAIN = "torchao", "tensor_names", "Tensor"
DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float4_e2m1fn_x2": "U8"}


def recognises(found: Found) -> bool:
    """Whether the header of a file names torchao's tensors."""
    return NAMES in found.metadata and any('"_type"' in text for text in found.metadata.values())


def read(format: ForeignFormat, found: Found) -> Foreign:
    """Open files of torchao's tensors; UserError for a header that is none, or tensors that are not as it says."""
    layers, rest, notes = {}, [], []
    for name in _json(found, NAMES, list):
        header = _json(found, name, dict)
        if header.get("_type") == PLAIN:
            rest.append(name)
            continue
        layer, note = _layer(found, name, header)
        layers[layer.name] = layer
        notes.append(note)
    swizzled = {"swizzled" if _is_swizzled(found, name) else "linear" for name in layers}
    dialect = {"nibbles": "low first", "block scales": " and ".join(sorted(swizzled)) or "none"}
    told = tuple(f"{count} layers {note}" for note, count in Counter(filter(None, notes)).items())
    return Foreign(format, found, dialect, layers, tuple(rest), told)


def _is_swizzled(found: Found, name: str) -> bool:
    return bool(_json(found, f"{name}.weight", dict)["_data"].get("is_swizzled_scales"))


def _json(found: Found, name: str, kind: type) -> Any:
    """An entry of the header's metadata; UserError where it is missing or something else."""
    try:
        content = json.loads(found.metadata[name])
    except (KeyError, ValueError, RecursionError):
        content = None
    if not isinstance(content, kind):
        raise UserError(f"the header of {found.path} says nothing of torchao about '{name}': get that file again")
    return content


def _named(data: Mapping[str, Any], key: str) -> Any:
    """The value under a key that is written with the name of its class; None for anything else."""
    value = data.get(key)
    return value.get("_data") if isinstance(value, dict) and not isinstance(value.get("_data"), dict | list) else None


def _layer(found: Found, name: str, header: Mapping[str, Any]) -> tuple[ForeignLayer, str | None]:
    kind, data = header.get("_type"), header.get("_data")
    module, _, weight = name.rpartition(".")
    if str(kind) not in READERS or not isinstance(data, dict) or weight != "weight":
        raise UserError(f"{name} of {found.path} is torchao's {kind}, which is not read here")
    here = f"{module}._weight_"
    shape, decode, format = READERS[kind](found, here, data)
    if any(f"{here}{extra}" in found.tensors for extra in ("act_pre_scale", "act_quant_scale")):
        raise UserError(f"{name} of {found.path} has static or smoothed inputs, which are not read here")
    fixed = f"{here}act_per_tensor_scale"
    static = (
        part(found, fixed, "F32", ()) and (lambda: found.tensor(fixed).reshape(1, 1))
        if fixed in found.tensors
        else None
    )
    activations, note = _activations(kind, data.get("act_quant_kwargs"), static is not None)
    nbytes = sum(tensor.end - tensor.begin for each, tensor in found.tensors.items() if each.startswith(here))
    return ForeignLayer(module, format, shape, nbytes, decode, activations, static), note


def _activations(kind: str, given: Any, static: bool) -> tuple[ActivationSpec | None, str | None]:
    """How the input is rounded, by the attributes of a tensor; what is to be said where that is not emulated."""
    if not isinstance(given, dict):
        return None, None
    data = given["_data"] if isinstance(given.get("_data"), dict) else {}
    named = {key: _named(data, key) for key in data}
    per = data.get("granularity")
    rowwise = isinstance(per, dict) and per.get("_type") == "PerRow"
    if kind == "NVFP4Tensor" and static != bool(data.get("use_dynamic_per_tensor_scale")):
        return inputs("nvfp4", NAME, "static:1" if static else "online"), None
    if kind == "MXTensor" and named.get("scaling_mode") == "RCEIL":
        return inputs("mxfp4" if named.get("elem_dtype") == "float4_e2m1fn_x2" else "mxfp8", NAME), None
    if kind == "MXTensor" and named.get("scaling_mode") == "FLOOR":
        return ActivationSpec.parse("mxfp4" if named.get("elem_dtype") == "float4_e2m1fn_x2" else "mxfp8"), None
    if kind == "Float8Tensor" and rowwise and named.get("float8_dtype") == "float8_e4m3fn":
        return inputs("fp8_e4m3", NAME), None
    if kind == "Int8Tensor" and rowwise and named.get("mapping_type") == "SYMMETRIC":
        return inputs("int8", NAME), None
    return None, "round their inputs in a way that is not emulated here"


def _nvfp4(found: Found, here: str, data: Mapping[str, Any]):
    rows, halves = matrix(found, f"{here}qdata", "U8")
    columns = 2 * halves
    if data.get("block_size") != 16 or columns % 16:
        raise UserError(f"'{here}qdata' of {found.path} has no blocks of 16")
    scales = _block_scales(found, here, data, "F8_E4M3", rows, columns // 16)
    base = f"{here}per_tensor_scale"
    if base in found.tensors:
        part(found, base, "F32", ())

    def decode() -> Tensor:
        scale = scales().view(torch.float8_e4m3fn).float()
        scale = found.tensor(base) * scale if base in found.tensors else scale
        return scaled(e2m1(found.tensor(f"{here}qdata")), scale)

    return (rows, columns), decode, "nvfp4"


def _mx(found: Found, here: str, data: Mapping[str, Any]):
    element = _named(data, "elem_dtype")
    if element not in DTYPES or data.get("block_size") != 32:
        raise UserError(f"'{here}qdata' of {found.path} has elements of {element}, in no blocks of 32")
    rows, bytes_ = matrix(found, f"{here}qdata", DTYPES[element])
    columns = bytes_ * (2 if DTYPES[element] == "U8" else 1)
    if columns % 32:
        raise UserError(f"'{here}qdata' of {found.path} has no blocks of 32")
    scales = _block_scales(found, here, data, "F8_E8M0", rows, columns // 32)

    def decode() -> Tensor:
        codes = found.tensor(f"{here}qdata")
        return scaled(e2m1(codes) if columns > bytes_ else codes.float(), e8m0(scales()))

    return (rows, columns), decode, "mxfp4" if columns > bytes_ else "mxfp8"


def _block_scales(found: Found, here: str, data: Mapping[str, Any], dtype: str, rows: int, columns: int):
    """Reads the scales of blocks, uint8 (rows, columns), from the order that they are said to be in."""
    name = f"{here}scale"
    if not data.get("is_swizzled_scales"):
        part(found, name, dtype, (rows, columns))
        return lambda: found.tensor(name).view(torch.uint8)
    part(found, name, dtype, (-(-rows // 128) * 32, -(-columns // 4) * 16))
    return lambda: from_blocked(found.tensor(name).view(torch.uint8).flatten(), rows, columns).contiguous()


def _scaled(format: str, *dtypes: str):
    """A reader of codes of one byte with scales of blocks, and zero points where there are some."""

    def reader(found: Found, here: str, data: Mapping[str, Any]):
        shape = matrix(found, f"{here}qdata", *dtypes)
        blocks = matrix(found, f"{here}scale", "F32", "BF16", "F16")
        zero = f"{here}zero_point"
        if any(size % count for size, count in zip(shape, blocks, strict=True)):
            raise UserError(f"'{here}scale' of {found.path} has {list(blocks)} blocks, and the weight is {list(shape)}")
        if zero in found.tensors and found.tensors[zero].shape != blocks:
            raise UserError(f"'{zero}' of {found.path} is not of the shape of its scales")

        def decode() -> Tensor:
            codes, scale = found.tensor(f"{here}qdata").float(), found.tensor(f"{here}scale").float()
            if zero in found.tensors:
                ones = torch.ones(shape, dtype=torch.float32)
                codes = codes - scaled(ones, found.tensor(zero).float())
            return scaled(codes, scale)

        return shape, decode, format

    return reader


READERS = {
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
    "Float8Tensor": _scaled("float8", "F8_E4M3", "F8_E5M2"),
    "Int8Tensor": _scaled("int8", "I8"),
    "IntxUnpackedToInt8Tensor": _scaled("intx", "I8"),
}
