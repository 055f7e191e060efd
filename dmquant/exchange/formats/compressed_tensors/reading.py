"""Read what compressed-tensors 0.20 writes, by the names of the tensors and the schemes of the configuration."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.decoding import e2m1, e8m0, matrix, part, scaled, stored_bytes
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found
from dmquant.exchange.layers import inputs
from dmquant.packing import packed_size, unpack

NAME = "compressed-tensors"
PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_shape",
    "weight_zero_point",
    "input_scale",
    "input_global_scale",
)


def recognises(found: Found) -> bool:
    """Whether a folder says that it is in layouts of compressed-tensors."""
    config = found.config.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == NAME


def read(format: ForeignFormat, found: Found) -> Foreign:
    """Open such a folder; UserError for layers whose tensors do not go together, or with zero points."""
    names = [name.removesuffix(".weight_scale") for name in found.tensors if name.endswith(".weight_scale")]
    layers = {name: _layer(found, name, _scheme(found, name)) for name in names}
    parts = {f"{name}.{one}" for name in layers for one in PARTS}
    rest = tuple(name for name in found.tensors if name not in parts)
    dialect = {"nibbles": "low first", "block scales": "linear", "global scale": "divided by"}
    return Foreign(format, found, dialect, layers, rest)


def _scheme(found: Found, name: str) -> Mapping[str, Any]:
    """The scheme whose targets name a layer, or linear layers as a whole; empty where none does."""
    groups = found.config["quantization_config"].get("config_groups")
    whole: Mapping[str, Any] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        targets = [str(target) for target in targets] if isinstance(targets, list) else []
        if name in targets or any(_matches(target, name) for target in targets):
            return group
        whole = group if "Linear" in targets else whole
    return whole


def _matches(target: str, name: str) -> bool:
    try:
        return re.match(target[3:] if target.startswith("re:") else fnmatch.translate(target), name) is not None
    except re.error:
        return False


def _layer(found: Found, name: str, scheme: Mapping[str, Any]) -> ForeignLayer:
    if f"{name}.weight_zero_point" in found.tensors:
        raise UserError(f"{name} of {found.path} has zero points, which are not read here")
    weights = scheme.get("weights")
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    packed = found.tensors.get(f"{name}.weight_packed")
    if packed is None:
        shape, decode, kind = _bytewise(found, name)
    elif packed.dtype == "U8":
        shape, decode, kind = _four_bits(found, name)
    else:
        shape, decode, kind = _packed(found, name, bits)
    nbytes = sum(stored_bytes(found, f"{name}.{one}") for one in PARTS)
    activations, scale = _inputs(found, name, scheme.get("input_activations"))
    return ForeignLayer(name, kind, shape, nbytes, decode, activations, scale)


def _inputs(found: Found, name: str, given: Any) -> tuple[ActivationSpec | None, Any]:
    """How the input is rounded, and its static scale as ours, which multiplies."""
    if not isinstance(given, dict):
        return None, None
    base, scale = f"{name}.input_global_scale", f"{name}.input_scale"
    kind = (given.get("num_bits"), given.get("type"), given.get("strategy"))
    if kind == (4, "float", "tensor_group") and base in found.tensors:
        part(found, base, "F32", (1,), ())
        return inputs("nvfp4", NAME, "static:1"), lambda: 1 / found.tensor(base).reshape(1, 1)
    if kind == (8, "float", "token"):
        return inputs("fp8_e4m3", NAME), None
    if kind == (8, "int", "token"):
        return inputs("int8", NAME), None
    if kind == (8, "float", "tensor") and scale in found.tensors:
        part(found, scale, "F32", (1,), ())
        spec = ActivationSpec.parse("fp8_e4m3", "tensor", scale="static:1")
        return spec, lambda: found.tensor(scale).reshape(1, 1)
    return None, None


def _four_bits(found: Found, name: str):
    """NVFP4, whose scales are divided by a global one, or MXFP4."""
    rows, halves = matrix(found, f"{name}.weight_packed", "U8")
    base = f"{name}.weight_global_scale"
    if base not in found.tensors:
        part(found, f"{name}.weight_scale", "U8", (rows, halves // 16))
    else:
        part(found, base, "F32", (1,), ())
        part(found, f"{name}.weight_scale", "F8_E4M3", (rows, halves // 8))

    def decode() -> Tensor:
        stored = found.tensor(f"{name}.weight_scale")
        scale = stored.float() / found.tensor(base).reshape(()) if base in found.tensors else e8m0(stored)
        return scaled(e2m1(found.tensor(f"{name}.weight_packed")), scale)

    return (rows, 2 * halves), decode, "nvfp4" if base in found.tensors else "mxfp4"


def _bytewise(found: Found, name: str):
    shape = rows, columns = matrix(found, f"{name}.weight", "F8_E4M3", "I8")
    stored = found.tensors[f"{name}.weight_scale"]
    exponents = stored.dtype == "U8"
    if exponents:
        part(found, f"{name}.weight_scale", "U8", (rows, columns // 32))
    elif stored.dtype not in ("F32", "BF16", "F16") or stored.shape not in ((1,), (), (rows, 1), (rows,)):
        raise UserError(f"'{name}.weight_scale' of {found.path} is no scale of a tensor, of rows or of blocks of 32")

    def decode() -> Tensor:
        scale = found.tensor(f"{name}.weight_scale")
        scale = e8m0(scale) if exponents else scale.float().reshape(-1, 1)
        return scaled(found.tensor(f"{name}.weight").float(), scale)

    kind = "int8" if found.tensors[f"{name}.weight"].dtype == "I8" else "fp8"
    return shape, decode, "mxfp8" if exponents else kind


def _packed(found: Found, name: str, bits: Any):
    """Integers of few bits in words; the weight's shape stands in a tensor of its own, which is read and checked."""
    rows, words = matrix(found, f"{name}.weight_packed", "I32")
    blocks = matrix(found, f"{name}.weight_scale", "F32", "BF16", "F16")
    part(found, f"{name}.weight_shape", "I64", (2,))
    shape = tuple(found.tensor(f"{name}.weight_shape").tolist())
    if bits not in range(2, 9) or shape[0] != rows or shape[1] < 1 or words != -(-shape[1] * bits // 32):
        raise UserError(f"'{name}.weight_packed' of {found.path} is no weight {list(shape)} of {bits} bits")
    if blocks[0] != rows or shape[1] % blocks[1]:
        raise UserError(
            f"'{name}.weight_scale' of {found.path} has {list(blocks)} blocks, and the weight is {list(shape)}"
        )

    def decode() -> Tensor:
        stream = found.tensor(f"{name}.weight_packed").view(torch.uint8)[:, : packed_size(shape[1], bits)]
        codes = unpack(stream.contiguous(), bits, shape[1]).float() - (1 << bits - 1)
        return scaled(codes, found.tensor(f"{name}.weight_scale").float())

    return shape, decode, f"int{bits}"
