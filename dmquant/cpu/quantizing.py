"""Quantizing without data in one compiled pass over the weights, with the results of `qtensor.fit_and_round`."""

import ctypes
import functools
import itertools
import logging
import math

import torch
from torch import Tensor, nn

from dmquant import qtensor
from dmquant.cpu.compiling import is_compiled, library
from dmquant.formats import FloatFormat, Format, IntFormat, LookupFormat, get_format
from dmquant.grids import ScaledGrid
from dmquant.packing import packed_size
from dmquant.qtensor import WeightSpec, check_finite, side_by_side
from dmquant.scaling import Scales, to_matrix
from dmquant.stores import LARGEST, OCTAVES_BELOW, STORES

NAME = "quantize"
PAYS_AFTER = 1 << 23  # weights in all; before, a run ends sooner without the seconds that compiling takes
_OWN_STORES = {
    name: (number, STORES[name]) for number, name in enumerate(("fp32", "bf16", "e8m0", "pow2", "e4m3", "e3m4"))
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDTHS = (16, 8, 4, 1)  # floats in a vector of torch's sums
_LARGEST_GROUP = 1 << 18  # sixteen of them, in float32, are at hand at once
_FEWEST_BINADES = -40  # exponents below would want quotients that are not safe from underflow
_BLOCK_ROWS, _PART = (
    16,
    1 << 18,
)  # rows that are packed together, as in quantize.cpp; weights that a thread takes at once
_CASES = (("fp4", "group:16"), ("int4", "group:64"), ("fp6", "channel"), ("fp4_e3m0", "group:40"), ("nl4", "group:32"))
_seen = 0


class _Format(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "bits", "mantissa", "min_exponent")),
        *((name, ctypes.c_float) for name in ("min", "max")),
        *((name, ctypes.c_void_p) for name in ("values", "ends")),
    ]


class _Job(ctypes.Structure):
    """The `Job` of quantize.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("matrix", "starts", "lengths", "amplitudes", "base", "scales")),
        *((name, ctypes.c_void_p) for name in ("multiples", "stored", "codes")),
        *((name, ctypes.c_int64) for name in ("columns", "groups", "size", "bytes", "base_stride")),
        *((name, ctypes.c_int64) for name in ("scale_stride", "multiple_count", "sum_width")),
        *((name, ctypes.c_int32) for name in ("dtype", "store", "octaves_below", "largest_exponent")),
        ("largest_scale", ctypes.c_float),
        *((name, _Format) for name in ("format", "of_scales")),
    ]


def fit_and_round(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...]) -> tuple[Tensor, Scales] | None:
    """As `qtensor.fit_and_round`, bit for bit; None where that is the way: for what is not compiled, or too little."""
    global _seen
    if not _takes(spec, matrix):
        return None
    _seen += matrix.numel()
    if (_seen < PAYS_AFTER and not is_compiled(NAME)) or not (width := _checked_width()):
        return None
    return _fit_and_round(matrix, spec, shape, width)


def _takes(spec: WeightSpec, matrix: Tensor) -> bool:
    size = spec.granularity.size or matrix.shape[1]
    return (
        matrix.device.type == "cpu"
        and spec.grid_type is ScaledGrid
        and spec.granularity.kind != "tensor"  # one sum over all is shared by torch's threads
        and spec.scale in ("absmax", "mse")
        and STORES[spec.store] is _OWN_STORES.get(spec.store, (None, None))[1]
        and _as_struct(spec.fmt) is not None
        and size <= _LARGEST_GROUP
    )


def relative_error(weight: Tensor, layer: nn.Module) -> float | None:
    """As `convert.relative_error`; None where that is the way."""
    spec, on_cpu = layer.weight_spec, weight.device.type == layer.qweight.device.type == "cpu"
    if layer.transforms or not on_cpu or spec.grid_type is not ScaledGrid:
        return None
    if not is_compiled(NAME) or not (functions := _functions()):
        return None
    job = _job(to_matrix(weight, spec.split), spec, layer.weight_shape)
    scales = layer.scales.decode().contiguous()
    values = spec.fmt.decode(torch.arange(2**spec.fmt.bits, dtype=torch.uint8, device="cpu"))
    job.scales, job.scale_stride, job.codes = (
        scales.data_ptr(),
        scales.stride(0) * (len(scales) > 1),
        layer.qweight.data_ptr(),
    )

    def measure(part: slice) -> tuple[float, float]:
        sums = (ctypes.c_double * 2)()
        functions.squares(job, values.data_ptr(), part.start, part.stop, sums)
        return tuple(sums)

    parts = _parts(layer.weight_shape[0], job.columns)
    lost, total = map(math.fsum, zip(*side_by_side(measure, parts, weight.device), strict=True))
    return lost / max(total, 1e-30)


def _fit_and_round(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], width: int) -> tuple[Tensor, Scales]:
    """`fit_and_round` by the compiled functions, with sums as torch's vectors of so many floats order them."""
    functions, (rows, columns), fmt = _functions(), matrix.shape, spec.fmt
    job, (number, store) = _job(matrix, spec, shape), _OWN_STORES[spec.store]
    amplitude = torch.empty(rows, job.groups, dtype=torch.float32, device="cpu")
    amplitudes, parts = amplitude.data_ptr(), _parts(rows, columns)
    side_by_side(lambda part: functions.amplitudes(job, part.start, part.stop, amplitudes), parts, matrix.device)
    check_finite(amplitude)
    base = spec.base(amplitude)
    multiples = torch.tensor(store.tried(fmt) if spec.scale == "mse" else (1.0,), dtype=torch.float32, device="cpu")
    codes = torch.empty(rows, job.bytes, dtype=torch.uint8, device="cpu")
    stored = torch.empty(spec.scale_shape(shape), dtype=store.dtype, device="cpu")
    job.amplitudes, job.stored, job.codes = amplitudes, stored.data_ptr(), codes.data_ptr()
    job.base, job.base_stride = (None, 0) if base is None else (base.data_ptr(), int(len(base) > 1))
    job.multiples, job.multiple_count, job.sum_width = multiples.data_ptr(), len(multiples), width
    job.store, job.octaves_below = number, OCTAVES_BELOW
    job.of_scales = _as_struct(get_format("fp8_e3m4" if spec.store == "e3m4" else "fp8_e4m3"))
    job.largest_exponent, job.largest_scale = math.frexp(fmt.max)[1] - 1, LARGEST / fmt.max
    side_by_side(lambda part: functions.quantize(job, part.start, part.stop), parts, matrix.device)
    return codes, Scales(stored, base, spec.store)


def _job(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...]) -> _Job:
    """What every function needs: a matrix (rows, columns), any float dtype, and the groups of its rows."""
    matrix = (matrix if matrix.dtype in _DTYPES else matrix.float()).contiguous()
    starts, lengths = _groups(spec, shape)
    job = _Job(
        columns=matrix.shape[1],
        groups=len(starts),
        size=spec.granularity.size or max(spec.segments(shape)),
        bytes=packed_size(matrix.shape[1], spec.fmt.bits),
        dtype=_DTYPES.index(matrix.dtype),
        format=_as_struct(spec.fmt) or _Format(bits=spec.fmt.bits),
    )
    job.held = matrix, starts, lengths  # pointers do not hold what they point to
    job.matrix, job.starts, job.lengths = matrix.data_ptr(), starts.data_ptr(), lengths.data_ptr()
    return job


def _groups(spec: WeightSpec, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first column of every group of a row, and how many columns it has; int64."""
    starts, lengths, start = [], [], 0
    for columns in spec.segments(shape):
        size = spec.granularity.size or columns
        starts += range(start, start + columns, size)
        lengths += [min(size, columns - at) for at in range(0, columns, size)]
        start += columns
    return torch.tensor(starts, device="cpu"), torch.tensor(lengths, device="cpu")


@functools.cache
def _functions() -> ctypes.CDLL | None:
    if functions := library(NAME):
        job, number, pointer = ctypes.POINTER(_Job), ctypes.c_int64, ctypes.c_void_p
        functions.amplitudes.argtypes = (job, number, number, pointer)
        functions.quantize.argtypes = (job, number, number)
        functions.squares.argtypes = (job, pointer, number, number, pointer)
        functions.sums.argtypes = (pointer, number, number, number, pointer)
        for function in (functions.amplitudes, functions.quantize, functions.squares, functions.sums):
            function.restype = None
    return functions


@functools.cache
def _checked_width() -> int | None:
    """The floats in a vector of torch's sums, if with them everything is as the definition has it; else None."""
    if not _functions():
        return None
    width = next(filter(_sums_agree, _WIDTHS), None)
    if width and all(_agrees(width, *case) for case in itertools.product(_CASES, _OWN_STORES, ("absmax", "mse"))):
        return width
    logging.getLogger("dmquant").warning("weights are quantized in the slower way: the compiled one differs here")
    return None


def _sums_agree(width: int) -> bool:
    for size in (3, 16, 40, 64, 1000, 4608):
        rows = torch.rand(24, size, generator=torch.Generator().manual_seed(size), dtype=torch.float32, device="cpu")
        sums = torch.empty(24, dtype=torch.float32, device="cpu")
        _functions().sums(rows.data_ptr(), *rows.shape, width, sums.data_ptr())
        if not torch.equal(sums, rows.sum(-1)):
            return False
    return True


def _agrees(width: int, case: tuple[str, str], store: str, rule: str) -> bool:
    spec = WeightSpec.parse(*case, rule, store)
    matrix = torch.randn(20, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    matrix *= torch.logspace(-3, 3, 150, dtype=torch.float32, device="cpu")
    (codes, scales), (expected, as_stored) = (
        _fit_and_round(matrix, spec, matrix.shape, width),
        qtensor.fit_and_round(matrix, spec, matrix.shape),
    )
    return torch.equal(codes, expected) and torch.equal(scales.stored, as_stored.stored)


def _parts(rows: int, columns: int) -> list[slice]:
    """Ranges of rows for threads to take one after another, whole blocks of rows that are packed together."""
    size = max(_BLOCK_ROWS, _PART // columns // _BLOCK_ROWS * _BLOCK_ROWS)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@functools.cache
def _as_struct(fmt: Format) -> _Format | None:
    """None for a format that is not compiled: of too many binades, or a table but of at most 16 integers of 8 bits."""
    if type(fmt) is FloatFormat and fmt.min_exponent > _FEWEST_BINADES:
        return _Format(1, fmt.bits, fmt.mantissa, fmt.min_exponent, -fmt.max, fmt.max)
    if type(fmt) is IntFormat:
        return _Format(0, fmt.bits, 0, 0, fmt.min, fmt.max)
    if type(fmt) is LookupFormat and len(fmt.table) <= 16 and set(fmt.table) <= set(range(-128, 128)):
        unused = 16 - len(fmt.table)  # entries that no value reaches
        padded = (*fmt.table, *(fmt.max,) * unused), (*fmt.ends, *(math.inf,) * (unused + 1))
        held = tuple(torch.tensor(each, dtype=torch.float32, device="cpu") for each in padded)
        made = _Format(2, fmt.bits, 0, 0, fmt.table[0], fmt.max, *(each.data_ptr() for each in held))
        made.held = held
        return made
    return None
