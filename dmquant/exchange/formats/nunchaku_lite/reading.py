"""Reading nunchaku_lite folders: their layers as diffusers declares them (quantizers/nunchaku/utils.py)."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.errors import UserError
from dmquant.exchange.formats.nunchaku_lite import packing
from dmquant.exchange.formats.nunchaku_lite.exporting import NAME, PRECISIONS, Precision
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found
from dmquant.formats import get_format

METHOD = "nunchaku_lite"
_INPUTS = {"int4": ("int4", "group:64"), "nvfp4": ("nvfp4",)}


def _quantization(found: Found) -> dict:
    content = found.config.get("quantization_config")
    return content if isinstance(content, dict) else {}


def recognises(found: Found) -> bool:
    return _quantization(found).get("quant_method") == METHOD


def open_folder(form: ForeignFormat, found: Found) -> Foreign:
    """The layers that the configuration lists; UserError for one whose tensors are not as diffusers declares them."""
    content = _quantization(found)
    if content.get("awq_w4a16"):
        raise UserError(f"{found.path} has layers in awq_w4a16, which are not read here")
    listed = content.get("svdq_w4a4")
    listed = listed if isinstance(listed, dict) else {}
    precision = next((one for one in PRECISIONS if one.name == listed.get("precision")), None)
    rank, targets = listed.get("rank"), listed.get("targets")
    if precision is None or not isinstance(rank, int) or not isinstance(targets, list):
        raise UserError(f"{found.path}: its quantization_config lists no svdq_w4a4 with precision, rank and targets")
    layers = {str(name): _layer(found, str(name), precision, rank) for name in targets}
    rest = tuple(name for name in found.tensors if name.rpartition(".")[0] not in layers)
    dialect = {"precision": precision.name, "rank": str(rank), "order": "registers of an MMA (Nunchaku)"}
    return Foreign(form, found, dialect, layers, rest)


def _layer(found: Found, name: str, precision: Precision, rank: int) -> ForeignLayer:
    codes = found.tensors.get(f"{name}.qweight")
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
        raise UserError(f"{found.path}: '{name}' has no qweight of bytes in two dimensions")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if rows % packing.TILE or columns % packing.TILE or rank % packing.RANKS:
        raise UserError(
            f"{found.path}: '{name}' of {columns} to {rows} and rank {rank} is no multiple of {packing.TILE} and "
            f"{packing.RANKS}, as Nunchaku's layers are"
        )
    high = found.tensors.get(f"{name}.proj_up")
    floats = "F16" if high is not None and high.dtype == "F16" else "BF16"
    scales = "F8_E4M3" if precision.name == "nvfp4" else floats
    expected = {
        "wscales": (scales, (columns // precision.group, rows)),
        "smooth_factor": (floats, (columns,)),
        "proj_down": (floats, (columns, rank)),
        "proj_up": (floats, (rows, rank)),
    }
    if precision.name == "nvfp4":
        expected |= {"wcscales": (floats, (rows,)), "wtscale": (floats, (1,))}
    if f"{name}.bias" in found.tensors:
        expected["bias"] = (floats, (rows,))
    for part, (dtype, shape) in expected.items():
        stored = found.tensors.get(f"{name}.{part}")
        if stored is None or (stored.dtype, stored.shape) != (dtype, shape):
            have = "is missing" if stored is None else f"is {stored.dtype} {list(stored.shape)}"
            raise UserError(f"{found.path}: '{name}.{part}' {have}, not {dtype} {list(shape)}")
    nbytes = sum(found.tensors[f"{name}.{part}"].end - found.tensors[f"{name}.{part}"].begin for part in expected)
    return ForeignLayer(
        name,
        f"svdq_{precision.name}",
        (rows, columns),
        nbytes + codes.end - codes.begin,
        functools.partial(_weight, found, name, precision),
        _inputs(precision),
        build=functools.partial(_built, found, name, precision),
    )


def _inputs(precision: Precision) -> ActivationSpec:
    return ActivationSpec.parse(*_INPUTS[precision.name], engine=NAME)


def _weight(found: Found, name: str, precision: Precision) -> Tensor:
    """The weight of the float layer, W^ / s + up down, float32 (rows, columns)."""
    smooth, down, up = (part.float() for part in _branch(found, name))
    return (decoded(found, name, precision) / smooth).addmm_(up, down)


def _branch(found: Found, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the input is divided by, (columns,), and the matrices (rank, columns) and (rows, rank) of the branch."""
    return (
        packing.unpack_vector(found.tensor(f"{name}.smooth_factor")),
        packing.unpack_down(found.tensor(f"{name}.proj_down")),
        packing.unpack_up(found.tensor(f"{name}.proj_up")),
    )


def decoded(found: Found, name: str, precision: Precision) -> Tensor:
    """The decoded codes, which multiply the smoothed and rounded input, float32 (rows, columns)."""
    codes = packing.unpack_codes(found.tensor(f"{name}.qweight"))
    scales = packing.unpack_scales(found.tensor(f"{name}.wscales")).float()
    weight = get_format(precision.format).decode(codes).unflatten(1, (-1, precision.group)) * scales.unsqueeze(-1)
    weight = weight.flatten(1)
    if precision.name == "nvfp4":
        of_rows = packing.unpack_vector(found.tensor(f"{name}.wcscales")).float()
        weight = weight * (found.tensor(f"{name}.wtscale").float() * of_rows).unsqueeze(1)
    return weight


def _built(found: Found, name: str, precision: Precision, layer: nn.Module) -> nn.Module:
    """The layer that computes as Nunchaku's kernels do, in the place of a float Linear."""
    bias = packing.unpack_vector(found.tensor(f"{name}.bias")) if f"{name}.bias" in found.tensors else None
    built = SvdqLinear(decoded(found, name, precision), *_branch(found, name), bias, _inputs(precision))
    return built.to(layer.weight.device, layer.weight.dtype)


class SvdqLinear(nn.Linear):
    """W^ Q(x / s) + up (down x) + b: an input (..., columns) to (..., rows), in the input's dtype."""

    def __init__(self, weight: Tensor, smooth: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, inputs):
        rows, columns = weight.shape
        super().__init__(columns, rows, bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.inputs = inputs
        for name, tensor in (("smooth", smooth), ("down", down), ("up", up)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        rounded = fake_quantize(x / self.smooth, self.inputs)
        return F.linear(rounded, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)
