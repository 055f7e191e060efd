"""SDNQ folders, read: integers and small floats in groups, with zero points, a branch and a rotation.

sdnq 0.2.8: dequantizer.py, packed_int/unpack.py, quant_utils.py. A weight is (codes * scale + zero point + up down) H,
computed in float32 unless the configuration says otherwise. Names of layers come with patterns (utils.py).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmquant.errors import UsageError, UserError
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found
from dmquant.formats import Format, get_format
from dmquant.host import weight_file

METHODS = ("sdnq", "sdnq_training")
PARTS = ("weight", "scale", "zero_point", "svd_up", "svd_down")
UNREAD = ("scale_dtype", "zero_point_dtype", "use_codebook")
"""Settings under which scales are codes themselves, or codes are places in a table."""
PLAIN = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
ALIASES = {"fp8": "float8_e4m3fn"}
MATMUL = "use_quantized_matmul"


class Packing(NamedTuple):
    """How codes of less than 8 bits are packed: codes of a group, its bytes, and their unpacking."""

    codes: int
    octets: int
    unpack: Callable[[Tensor], list[Tensor]]
    """Bytes (groups, octets) to one tensor a code, (groups,), whose higher bits may be anything."""


def _sevens(b: Tensor) -> list[Tensor]:
    last = functools.reduce(torch.bitwise_or, (b[:, place] >> 7 << 6 - place for place in range(7)))
    return [*b.unbind(1), last]


def _sixes(b: Tensor) -> list[Tensor]:
    return [*b.unbind(1), b[:, 0] >> 6 << 4 | b[:, 1] >> 6 << 2 | b[:, 2] >> 6]


def _fives(b: Tensor) -> list[Tensor]:
    low, high = b[:, :3] >> 5, b[:, 3:] >> 5
    last = low[:, 2] | high[:, 0] << 2 & 16 | high[:, 1] << 1 & 8
    return [*b.unbind(1), *(low[:, :2] | high << 3 & 24).unbind(1), last]


def _threes(b: Tensor) -> list[Tensor]:
    last = [b[:, 0] >> 6 | b[:, 2] >> 4 & 4, b[:, 1] >> 6 | b[:, 2] >> 5 & 4]
    return [*b.unbind(1), *(b >> 3).unbind(1), *last]


def _fields(bits: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda b: [b[:, 0] >> shift for shift in range(0, 8, bits)]


PACKINGS = {
    7: Packing(8, 7, _sevens),
    6: Packing(4, 3, _sixes),
    5: Packing(8, 5, _fives),
    4: Packing(2, 1, _fields(4)),
    3: Packing(8, 3, _threes),
    2: Packing(4, 1, _fields(2)),
}


def _quantization(found: Found) -> Mapping[str, Any]:
    content = found.config.get("quantization_config")
    return content if isinstance(content, dict) else {}


def recognises(found: Found) -> bool:
    return _quantization(found).get("quant_method") in METHODS


def read(found: Found) -> Foreign:
    """The layers with a scale; UserError for settings and layouts that are not read."""
    content = _quantization(found)
    named = [name.removesuffix(".scale") for name in found.tensors if name.endswith(".scale")]
    layers = {name: _layer(found, name, _settings(found, content, name)) for name in named}
    rest = tuple(name for name in found.tensors if name.rpartition(".")[0] not in layers or _is_bias(name))
    notes = ()
    if content.get(MATMUL):
        notes = ("on GPUs sdnq quantizes weights once more and rounds inputs, which is not emulated",)
    dialect = {"packing": "sdnq", "weights": str(content.get("weights_dtype"))}
    return Foreign(FORMAT, found, dialect, layers, rest, notes)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _settings(found: Found, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a layer, its `dtype` among them."""
    weight = f"{name}.weight"
    settings = dict(content)
    own = content.get("modules_quant_config") or {}
    settings |= own.get(_named(weight, own) or "", {})
    dtype = str(settings.get("weights_dtype", "int8"))
    for key, names in (content.get("modules_dtype_dict") or {}).items():
        if _named(weight, names):
            dtype = _at_least(dtype, key.lower())
            break
    settings["dtype"] = ALIASES.get(dtype, dtype)
    for setting in UNREAD:
        if settings.get(setting) not in (None, False, "none"):
            raise UserError(f"{found.path}: '{name}' has {setting}, which is not read here")
    return settings


def _named(name: str, patterns: Iterable[str]) -> str | None:
    """The first of sdnq's patterns that a parameter's name matches: a name, a part of one, a beginning, a glob."""

    def matches(pattern: str) -> bool:
        if pattern.startswith("."):
            return name.startswith(pattern[1:])
        glob = pattern.replace(".*", "\\.*").replace("*", ".*")
        return name == pattern or pattern in name.split(".") or ("*" in pattern and re.match(glob, name) is not None)

    return next(filter(matches, patterns), None)


def _at_least(dtype: str, key: str) -> str:
    """The dtype that an entry of `modules_dtype_dict` makes of a layer's: `int6`, or `minimum_6bit` and the like."""
    bits = re.fullmatch(r"(?:minimum)?[-_]?(u?int)?(\d+)[-_]?(?:bits?)?", key)
    if bits is None or key.startswith(("int", "uint")):
        return key
    kind, least = bits[1], int(bits[2])
    if _bits(dtype) >= least:
        return dtype
    return f"uint{least}" if kind == "uint" or least <= 4 else f"int{least}"


def _bits(dtype: str) -> int:
    found = re.match(r"[a-z]+(\d+)", ALIASES.get(dtype, dtype))
    return int(found[1]) if found else 0


def _layer(found: Found, name: str, settings: Mapping[str, Any]) -> ForeignLayer:
    dtype, parts = settings["dtype"], {part: found.tensors.get(f"{name}.{part}") for part in PARTS}
    parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
    if "weight" not in parts:
        raise UserError(f"{found.path}: '{name}' has a scale and no weight")
    if dtype not in PLAIN and (_format(dtype) is None or _bits(dtype) not in PACKINGS):
        raise UserError(f"{found.path}: '{name}' is in {dtype}, which is not read here")
    shape = _shape(found, name, dtype, parts["weight"], parts["scale"])
    if dtype.startswith("uint") != ("zero_point" in parts):
        have = "has" if "zero_point" in parts else "lacks"
        raise UserError(f"{found.path}: '{name}' in {dtype} {have} a zero point")
    if "zero_point" in parts and parts["zero_point"].shape != parts["scale"].shape:
        raise UserError(f"{found.path}: '{name}' has zero points that are not shaped as its scales")
    if ("svd_up" in parts) != ("svd_down" in parts):
        raise UserError(f"{found.path}: '{name}' has half a branch")
    if "svd_up" in parts:
        _check_branch(found, name, shape, parts["svd_up"].shape, parts["svd_down"].shape)
    nbytes = sum(tensor.end - tensor.begin for tensor in parts.values())
    weight = functools.partial(_weight, found, name, settings, shape, tuple(parts))
    return ForeignLayer(name, dtype, shape, nbytes, weight)


def _check_branch(found: Found, name: str, shape: tuple[int, int], up: tuple[int, ...], down: tuple[int, ...]) -> None:
    """UserError unless the branch is up (rows, rank) and down (rank, columns), or both the other way round."""
    ways = (up, down), (up[::-1], down[::-1])
    if not any(one[:1] + other[1:] == shape and one[1:] == other[:1] for one, other in ways):
        raise UserError(f"{found.path}: '{name}' of shape {list(shape)} has a branch of {list(up)} and {list(down)}")


def _format(dtype: str) -> Format | None:
    """The format of a dtype of ours; None where there is none."""
    small = re.fullmatch(r"float([2-7])_e(\d)m(\d)fn", dtype)
    integer = re.fullmatch(r"u?int([2-7])", dtype)
    try:
        if small:
            return get_format(f"fp{small[1]}_e{small[2]}m{small[3]}")
        return get_format(f"int{integer[1]}") if integer else None
    except UsageError:
        return None


def _shape(
    found: Found, name: str, dtype: str, weight: weight_file.Tensor, scale: weight_file.Tensor
) -> tuple[int, int]:
    """Shape of a Linear's weight; UserError where the tensors are no Linear's, or do not fit one another."""
    groups = scale.shape[1] if len(scale.shape) == 3 else 1
    rows, elements = scale.shape[0] if scale.shape else 0, math.prod(weight.shape)
    if dtype in PLAIN:
        transposed = len(weight.shape) == 2 and scale.shape == (1, weight.shape[1]) and weight.shape[0] > 1
        rows = weight.shape[1] if transposed else weight.shape[0]
        fits = weight.dtype == PLAIN[dtype] and len(weight.shape) in (2, 3)
        fits &= transposed or math.prod(scale.shape) in (1, rows * groups)
    else:
        packing = PACKINGS[_bits(dtype)]
        fits = weight.dtype == "U8" and elements % packing.octets == 0 and rows > 1
        elements = elements // packing.octets * packing.codes
        fits &= scale.shape in ((rows, 1), (rows, groups, 1))
    if not fits or elements % (rows * groups) or len(scale.shape) > 3:
        raise UserError(
            f"{found.path}: '{name}' has {weight.dtype} {list(weight.shape)} and scales {list(scale.shape)}: it is no "
            f"Linear in {dtype} with scales of rows or groups, and others are not read here"
        )
    return rows, elements // rows


def _weight(
    found: Found, name: str, settings: Mapping[str, Any], shape: tuple[int, int], parts: tuple[str, ...]
) -> Tensor:
    rows, columns = shape
    wide = torch.float32 if settings.get("dequantize_fp32", True) else None
    stored = {part: found.tensor(f"{name}.{part}") for part in parts}
    floats = {part: one.to(wide or one.dtype) for part, one in stored.items() if part != "weight"}
    scale, codes = floats["scale"], _codes(stored["weight"], settings["dtype"])
    if codes.ndim == 2 and scale.shape == (1, rows) and codes.shape == (columns, rows) and rows > 1:
        codes, scale = codes.T, scale.T
    groups = scale.shape[1] if scale.ndim == 3 else 1
    scale = scale.reshape(-1, groups, 1) if scale.numel() > 1 else scale.reshape(1, 1, 1)
    codes = codes.reshape(rows, groups, -1).to(scale.dtype)
    if "zero_point" in floats:
        weight = torch.addcmul(floats["zero_point"].reshape(scale.shape), codes, scale).view(shape)
    else:
        weight = codes.mul_(scale).view(shape)
    if "svd_up" in floats:
        up, down = floats["svd_up"], floats["svd_down"]
        if (up.shape[0], down.shape[1]) != shape:
            up, down = up.T, down.T
        weight = weight.to(up.dtype).addmm_(up, down)
    if settings.get("use_hadamard"):
        weight = _rotated(weight.float(), int(settings.get("hadamard_group_size", 256)))
    return weight.float()


def _codes(weight: Tensor, dtype: str) -> Tensor:
    """Values of codes, in one dimension where they were packed."""
    if dtype in PLAIN:
        return weight
    packing, bits = PACKINGS[_bits(dtype)], _bits(dtype)
    groups = weight.flatten().view(-1, packing.octets)
    codes = torch.stack(packing.unpack(groups), 1).bitwise_and_(2**bits - 1).flatten()
    if dtype.startswith("uint"):
        return codes
    if dtype.startswith("int"):
        return codes.to(torch.int8) - 2 ** (bits - 1)
    return _format(dtype).decode(codes)


def _rotated(weight: Tensor, largest: int) -> Tensor:
    """The weight with its blocks of columns multiplied by sdnq's Hadamard matrix, which is its own inverse."""
    size = 1 << (min(weight.shape[1], largest) - 1).bit_length()
    while weight.shape[1] % size:
        size //= 2
    if size < 4:
        return weight
    return torch.matmul(weight.unflatten(-1, (-1, size)), _hadamard(size).T).flatten(-2)


@functools.cache
def _hadamard(size: int) -> Tensor:
    """Powers by Kronecker of a regular matrix of 4 where the size is a power of 4, else of Sylvester's of 2."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    two = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float32)
    step = four if size.bit_length() % 2 else two
    return functools.reduce(torch.kron, [step] * int(math.log(size, len(step)) + 0.5)) / size**0.5


FORMAT = ForeignFormat("sdnq", "SDNQ (SD.Next)", recognises, read, folder=True)
