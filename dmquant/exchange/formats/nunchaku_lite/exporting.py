"""Writing SVDQuant layers: codes, scales, smoothing and branch in the slots of diffusers' nunchaku_lite layers.

A layer computes W^ Q(x / s) + up (down x) + b (nunchaku, src/kernels/zgemm/gemm_w4a4.cuh): the branch takes the input
as it is, where dmquant's takes the smoothed one, and smoothing divides the input, where dmquant multiplies it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange import folder
from dmquant.exchange.formats.nunchaku_lite import packing
from dmquant.exchange.interfaces import Exported, Progress
from dmquant.exchange.layers import as_stored, check, check_class, counted, described
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import Entry
from dmquant.layers import QuantLinear
from dmquant.packing import unpack
from dmquant.qtensor import WeightSpec

NAME = "nunchaku-lite"
RECIPE = f"quantize with --for {NAME}"
TRANSFORMS = ("smooth", "lowrank")
MANTISSAS = 128  # of bfloat16
_USAGE = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype=torch.bfloat16).to("cuda")"""


@dataclass(frozen=True)
class Precision:
    """A kernel by its name in the configuration: format, group and store of the weights, and the scales' dtype."""

    name: str
    format: str
    group: int
    store: str
    scales: torch.dtype


PRECISIONS = (
    Precision("int4", "int4", 64, "bf16", torch.bfloat16),
    Precision("nvfp4", "fp4_e2m1", 16, "e4m3", torch.float8_e4m3fn),
)


def precision_of(spec: WeightSpec) -> Precision | None:
    """The kernel that multiplies such weights; None where there is none."""
    for one in PRECISIONS:
        same = (spec.fmt.name, spec.granularity.size, spec.store) == (one.format, one.group, one.store)
        if same and spec.split is None:
            return one
    return None


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why Nunchaku's kernels cannot take a layer."""
    if why := check_class(layer, packing.TILE):
        return why
    if layer.out_features % packing.TILE:
        return f"has {layer.out_features} outputs, no multiple of {packing.TILE}"
    if precision_of(spec) is None:
        return f"has weights in {described(spec)}, and those are INT4 in groups of 64 with scales in bf16, or NVFP4"
    return None


def export(source: Source, out: Path, progress: Progress) -> Exported:
    """Write a pipeline folder whose quantized layers are SVDQW4A4Linear to diffusers."""
    precision, rank = _checked(source)
    entries, exact = [], True
    read = functools.lru_cache(1)(source.layer)  # tensors of a layer follow one another, by the bytes of their dtypes
    for name, layer in source.layers.items():
        entries += _entries(read, name, layer, precision, rank)
        exact &= not layer.transforms and layer.scale_base is None
    entries += as_stored(source, source.rest)
    targets = {"precision": precision.name, "group_size": precision.group, "rank": rank, "targets": [*source.layers]}
    quantization = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", "svdq_w4a4": targets}
    folder.write(source, out, folder.Folder(NAME, "Nunchaku's kernels", entries, quantization, _USAGE), progress)
    kinds = [precision.name] * len(source.layers)
    return Exported(out, counted(source, kinds), exact, tuple(_notes(source)))


def _checked(source: Source) -> tuple[Precision, int]:
    """The one kernel of all layers, and the rank of their branches; UserError for what it cannot take."""
    check(source, NAME, refuses, TRANSFORMS)
    found: dict[Precision, str] = {}
    rank = 0
    for name, layer in source.layers.items():
        found[precision_of(layer.weight_spec)] = name
        rank = max([rank, *(transform.rank for transform in layer.transforms if transform.name == "lowrank")])
    if len(found) > 1:
        one, other = (f"'{name}' is in {kind.name}" for kind, name in itertools.islice(found.items(), 2))
        raise UserError(f"{one} and {other}: {NAME} has one precision for all layers; {RECIPE}")
    if not found:
        raise UserError(f"{source.folder} has no quantized layers for {NAME}; {RECIPE}")
    return next(iter(found)), max(packing.RANKS, -(-rank // packing.RANKS) * packing.RANKS)


def _entries(
    read: Callable[[str], QuantLinear], name: str, layer: QuantLinear, precision: Precision, rank: int
) -> list[Entry]:
    rows, columns, groups = layer.out_features, layer.in_features, layer.in_features // precision.group

    def entry(part: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[QuantLinear], Tensor]) -> Entry:
        return Entry(f"{name}.{part}", dtype, tuple(shape), lambda: make(read(name)))

    bf16 = torch.bfloat16
    entries = [
        entry("qweight", torch.int8, (rows, columns // 2), _codes),
        entry(
            "wscales",
            precision.scales,
            (groups, rows),
            lambda one: packing.pack_scales(one.scales.stored.view(precision.scales)),
        ),
        entry("smooth_factor", bf16, (columns,), lambda one: packing.pack_vector(_divisor(one))),
        entry("proj_down", bf16, (columns, rank), lambda one: packing.pack_down(_down(one, rank))),
        entry("proj_up", bf16, (rows, rank), lambda one: packing.pack_up(_up(one, rank))),
    ]
    if layer.bias is not None:
        entries.append(entry("bias", bf16, (rows,), lambda one: packing.pack_vector(one.bias.detach().to(bf16))))
    if precision.name == "nvfp4":
        entries.append(entry("wtscale", bf16, (1,), lambda one: two_factors(one.scales.base)[0].view(1)))
        entries.append(entry("wcscales", bf16, (rows,), lambda one: two_factors(one.scales.base)[1].repeat(rows)))
    return entries


def _codes(layer: QuantLinear) -> Tensor:
    return packing.pack_codes(unpack(layer.qweight, 4, layer.in_features))


def two_factors(base: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers in bfloat16, 0-dim, whose product is nearest to a float32 one, of one element.

    The kernel multiplies by one number for the tensor and by one for each output: together they have twice the bits.
    """
    mantissa, exponent = torch.frexp(base.double().reshape(()))
    first = (MANTISSAS + torch.arange(MANTISSAS, dtype=torch.float64)) / (2 * MANTISSAS)  # 0.5 to 1, as frexp's
    second = (mantissa / first).bfloat16()
    best = (first * second.double() - mantissa).abs().argmin()
    return torch.ldexp(first[best], exponent).bfloat16(), second[best]


def _parts(layer: QuantLinear, name: str) -> dict[str, Tensor] | None:
    return next((layer.parts(one) for one in layer.transforms if one.name == name), None)


def _divisor(layer: QuantLinear) -> Tensor:
    """What the kernel divides the input's channels by, bfloat16 (columns,)."""
    smooth = _parts(layer, "smooth")
    ones = torch.ones(layer.in_features, dtype=torch.bfloat16)
    return ones if smooth is None else (1 / smooth["factor"].float().flatten()).bfloat16()


def _down(layer: QuantLinear, rank: int) -> Tensor:
    """The branch's first matrix for the input that is not smoothed, padded to `rank` rows; bfloat16 (rank, columns)."""
    branch, smooth = _parts(layer, "lowrank"), _parts(layer, "smooth")
    if branch is None:
        return torch.zeros(rank, layer.in_features, dtype=torch.bfloat16)
    down = branch["down"].float()
    down = down if smooth is None else down * smooth["factor"].float()
    return F.pad(down.bfloat16(), (0, 0, 0, rank - len(down)))


def _up(layer: QuantLinear, rank: int) -> Tensor:
    branch = _parts(layer, "lowrank")
    if branch is None:
        return torch.zeros(layer.out_features, rank, dtype=torch.bfloat16)
    return F.pad(branch["up"], (0, rank - branch["up"].shape[1]))


def _notes(source: Source) -> Iterator[str]:
    yield "it runs on NVIDIA's GPUs from Turing on, but Hopper, with the package kernels; NVFP4 takes Blackwell"
    layers = source.layers.values()
    if any(transform.name == "smooth" for layer in layers for transform in layer.transforms):
        yield "factors of smoothing are stored as their reciprocals, which bfloat16 rounds"
    if any(layer.scale_base is not None for layer in layers):
        yield "NVFP4's scale of a tensor becomes two numbers in bfloat16, whose product is within 3 in 10,000 of it"
    of_inputs = {(one and (one.fmt.name, one.granularity.size)) for one in (layer.activations for layer in layers)}
    wanted = {(one.format, one.group) for one in PRECISIONS if precision_of(next(iter(layers)).weight_spec) is one}
    if of_inputs != wanted:
        yield f"its kernel rounds inputs like the weights, which this model's recipe does not; {RECIPE}"
