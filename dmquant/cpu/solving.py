"""Solving on a CPU: the parts of GPTQ and of the search of scales that are no matrix products, in compiled code."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dmquant.cpu.compiling import library
from dmquant.formats import FloatFormat, Format, IntFormat
from dmquant.grids import Grid, ScaledGrid

_WORTH_A_THREAD = 1 << 17  # weights; below, starting a thread takes longer than it saves


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
    fmt = _Format.of(grid.spec.fmt)
    tensors = (wanted, coupling, before)
    if not isinstance(grid, ScaledGrid) or fmt is None or any(each.dtype != torch.float32 for each in tensors):
        return None
    if not (wanted.is_contiguous() and before.is_contiguous()) or (compiled := library("solve")) is None:
        return None
    coupling, values = coupling.contiguous(), torch.empty_like(wanted)
    scales = grid.scale_of_columns[list(columns)]
    count, rows = wanted.shape

    def work(first: int, end: int) -> None:
        of_rows = (ctypes.c_void_p(each.data_ptr() + 4 * first) for each in (scales, before, wanted, values))
        scales_at, before_at, wanted_at, values_at = of_rows
        compiled.round_in_turn(
            ctypes.byref(fmt), *map(ctypes.c_int64, (count, end - first, rows)),
            scales_at, ctypes.c_void_p(coupling.data_ptr()), before_at, wanted_at, values_at,
        )  # fmt: skip

    _in_threads(work, rows, wanted.numel())
    return values


def search_weighted(groups: Tensor, fmt: Format, scales: Tensor, weights: Tensor) -> Tensor | None:
    """Which scale of each group has the least squared error, its elements counting by weight: int64 (powers, rows, n).

    `groups` is float32 (rows, n, size), `scales` float32 (tried, rows, n), fewer than 256, and `weights` float32
    (powers, n, size). Of several alike the first. None for what the compiled code does not take.
    """
    known = _Format.of(fmt)
    if groups.device.type != "cpu" or known is None or (compiled := library("solve")) is None:
        return None
    groups, scales, weights = groups.contiguous(), scales.contiguous(), weights.contiguous()
    rows, count, size = groups.shape
    chosen = torch.empty(len(weights), rows, count, dtype=torch.uint8)

    def work(first: int, end: int) -> None:
        numbers = (first, end, rows, count, size, len(scales), len(weights))
        pointers = (each.data_ptr() for each in (groups, scales, weights, chosen))
        compiled.search_weighted(
            ctypes.byref(known), *map(ctypes.c_int64, numbers), *map(ctypes.c_void_p, pointers)
        )

    _in_threads(work, rows, groups.numel() * len(scales))
    return chosen.long()


def _in_threads(work: Callable[[int, int], None], rows: int, size: int) -> None:
    """Do work(first, end) for all rows, in as many threads as torch uses where that pays; rows are independent."""
    threads = min(torch.get_num_threads(), 1 + size // _WORTH_A_THREAD, rows)
    edges = [rows * part // threads for part in range(threads + 1)]
    if threads == 1:
        work(0, rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
