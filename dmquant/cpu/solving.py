"""Calibration on a CPU: what is no matrix product of GPTQ, of the search of scales, and of the rounding of inputs.

Compiled code with the results of the eager one, but for the order of some sums.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec, online_scale
from dmquant.cpu.addresses import is_plain
from dmquant.cpu.compiling import library
from dmquant.formats import FloatFormat, Format, IntFormat
from dmquant.grids import Grid, ScaledGrid
from dmquant.stores import LARGEST

_WORTH_A_THREAD = 1 << 17  # elements; below, starting a thread takes longer than it saves
LANES = 16  # elements of a vector of solve.cpp
_ONLINE = {torch.float32: "round_online", torch.bfloat16: "round_online_bf16"}


class _Format(ctypes.Structure):
    """`Format` of solve.cpp."""

    _fields_ = (
        ("floating", ctypes.c_int32), ("mantissa", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32), ("max_exponent", ctypes.c_int32),
        ("min", ctypes.c_float), ("max", ctypes.c_float),
    )  # fmt: skip

    @classmethod
    def of(cls, fmt: Format) -> "_Format | None":
        """None for a format whose values follow no rule."""
        if isinstance(fmt, FloatFormat):
            return cls(1, fmt.mantissa, fmt.min_exponent, fmt.max_exponent, -fmt.max, fmt.max)
        return cls(0, 0, 0, 0, fmt.min, fmt.max) if isinstance(fmt, IntFormat) else None


def round_in_turn(
    grid: Grid, columns: Sequence[int], wanted: Tensor, coupling: Tensor, before: Tensor
) -> Tensor | None:
    """As `gptq.round_in_turn`, same shapes; None for what the compiled code does not take."""
    fmt, tensors = _Format.of(grid.spec.fmt), (wanted, coupling, before)
    if not isinstance(grid, ScaledGrid) or fmt is None or any(each.dtype != torch.float32 for each in tensors):
        return None
    if not (wanted.is_contiguous() and before.is_contiguous()) or (compiled := library("solve")) is None:
        return None
    values, scales = torch.empty_like(wanted), grid.scale_of_columns[list(columns)]
    coupling, size = coupling.contiguous(), wanted.numel()
    _call(compiled.round_in_turn, fmt, size, *wanted.shape, scales, coupling, before, wanted, values)
    return values


def search_weighted(groups: Tensor, fmt: Format, scales: Tensor, weights: Tensor) -> Tensor | None:
    """Which scale of each group has the least squared error, its elements counting by weight: int64 (powers, rows, n).

    `groups` is float32 (rows, n, size), `scales` float32 (tried, rows, n), fewer than 256, and `weights` float32
    (powers, n, size), all on the CPU. Of several alike the first. None for what the compiled code does not take.
    """
    known = _Format.of(fmt)
    if known is None or (compiled := library("solve")) is None:
        return None
    (rows, count, size), tried, powers = groups.shape, len(scales), len(weights)
    chosen = torch.empty(powers, rows, count, dtype=torch.uint8, device="cpu")
    tensors = (groups.contiguous(), scales.contiguous(), weights.contiguous(), chosen)
    _call(compiled.search_weighted, known, groups.numel() * tried, rows, count, size, tried, powers, *tensors)
    return chosen.long()


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int) -> Tensor | None:
    """As `activations.fake_quantize` of online scales without a split, bit for bit; None for what is not compiled."""
    fmt, tokens = _Format.of(spec.fmt), x.movedim(dim, -1)
    size = spec.granularity.size or tokens.shape[-1]
    if (
        fmt is None
        or spec.refused
        or spec.granularity.kind not in ("token", "group")
        or size % LANES
        or tokens.shape[-1] % size
    ):
        return None
    if not is_plain(x) or x.is_meta or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if not x.numel() or (compiled := library("solve")) is None:
        return None
    if spec.store == "fp32" and x.dtype in _ONLINE:
        exact = tokens.contiguous()
        count, rounded = x.numel() // size, torch.empty_like(exact)
        largest = LARGEST / spec.fmt.max
        _call(getattr(compiled, _ONLINE[x.dtype]), fmt, x.numel(), exact, count, size, largest, rounded)
        return rounded.movedim(-1, dim)
    exact = tokens.float().contiguous()
    runs = exact.view(-1, tokens.shape[-1] // size, size)
    largest, rounded = runs.new_empty(runs.shape[:2]), torch.empty_like(exact)
    _call(compiled.magnitudes, None, runs.numel(), runs, largest.numel(), size, largest)
    scales = online_scale(largest.unsqueeze(-1), 1 if dim % x.ndim == 0 else len(x), spec).contiguous()
    _call(compiled.round_runs, fmt, runs.numel(), runs, largest.numel(), size, scales, rounded)
    return rounded.movedim(-1, dim).to(x.dtype)


def round_straight(grid: Grid, x: Tensor) -> Tensor | None:
    """The values of `grid` nearest to `x` (rows, columns), float32; None for what the compiled code does not take."""
    if (runs := _runs(grid, x)) is None:
        return None
    fmt, count, size = runs
    values = torch.empty_like(x)
    _call(library("solve").round_runs, fmt, x.numel(), x, count, size, grid.scale, values)
    return values


def straight_gradient(grid: Grid, x: Tensor, values: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients by `x` and by the logarithms of the scales, of the values that `round_straight` gave for it.

    All are (rows, columns), float32, but the last, which has the shape of the scales. None as there.
    """
    gradient = gradient.contiguous()
    if (runs := _runs(grid, x, values, gradient)) is None:
        return None
    fmt, count, size = runs
    by_x, by_scale = torch.empty_like(x), torch.empty_like(grid.scale)
    tensors = (grid.scale, by_x, by_scale)
    _call(library("solve").straight_gradient, fmt, x.numel(), x, values, gradient, count, size, *tensors)
    return by_x, by_scale


def _runs(grid: Grid, *tensors: Tensor) -> "tuple[_Format, int, int] | None":
    """The format of a grid, its number of scales, and the number of weights, one after another, that share each."""
    fmt, count = _Format.of(grid.spec.fmt), grid.scale.numel()
    whole = not any(columns % (grid.spec.granularity.size or columns) for columns in grid.segments)
    whole = whole and (grid.spec.granularity.kind == "group" or len(grid.segments) == 1)
    if fmt is None or not isinstance(grid, ScaledGrid) or not whole or grid.weight.numel() // count % LANES:
        return None
    plain = (each.device.type == "cpu" and each.dtype == torch.float32 and is_plain(each) for each in tensors)
    if not all(plain) or not all(each.is_contiguous() for each in (grid.scale, *tensors)) or library("solve") is None:
        return None
    return fmt, count, grid.weight.numel() // count


def _call(function: "ctypes._CFuncPtr", fmt: _Format | None, size: int, *arguments: int | float | Tensor) -> None:
    """Call with a format, if any, as many threads as torch uses where that pays for `size` elements, and arguments."""
    threads = threads_for(size)
    function(*((threads,) if fmt is None else (ctypes.byref(fmt), threads)), *map(passed, arguments))


def threads_for(size: int) -> ctypes.c_int:
    """The number of threads that pays for `size` elements, at most as many as torch uses."""
    return ctypes.c_int(min(torch.get_num_threads(), 1 + size // _WORTH_A_THREAD))


def passed(argument: int | float | Tensor | None) -> "ctypes._SimpleCData":
    """An argument of a compiled function: a tensor or None as an address, int64, float32."""
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
