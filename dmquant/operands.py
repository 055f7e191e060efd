"""Operands of exact products: formats whose values are small integers times a unit, and weights that are."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.formats import FloatFormat, Format, IntFormat
from dmquant.grids import ScaledGrid
from dmquant.stores import floor_exponent, power_of_two
from dmquant.transforms import Storage

INT8 = 127


@functools.lru_cache(maxsize=64)
def unit_of(fmt: Format) -> float | None:
    """The largest power of two of which all values of a format are multiples, up to INT8 of them; None without."""
    if not isinstance(fmt, FloatFormat | IntFormat) or fmt.max / fmt.min_positive > INT8:
        return None
    return fmt.min_positive


@dataclass(frozen=True)
class IntegerWeight:
    """A weight's matrix form (outputs, columns) as integers times one scale of each output.

    W[o, c] = scale[half of c, o] * values[code] * 2^shifts[o, group of c], exactly; without a split there is one half.
    """

    values: Tensor
    """Integers by code, int32 (2^bits,)."""
    shifts: Tensor
    """uint8 (outputs, groups)."""
    scale: Tensor
    """float32 (halves, outputs)."""

    @property
    def largest(self) -> int:
        """The largest magnitude that a code and a shift can make."""
        return int(self.values.abs().max()) << int(self.shifts.max())

    def tables(self) -> Tensor:
        """The integers by shift and code, int8 (8, 2^bits); those that no weight has may be wrong."""
        return torch.stack([self.values << shift for shift in range(8)]).to(torch.int8)


def integer_weight(layer: nn.Module) -> IntegerWeight:
    """The integers of a quantized layer's weight; ValueError, which says why, where it has no such form in int8."""
    spec = layer.weight_spec
    unit = unit_of(spec.fmt) if spec.grid_type is ScaledGrid else None
    if unit is None:
        raise ValueError(
            f"weights in {spec.fmt.name}{'' if spec.store != 'table' else ' tables'} are no small integers"
        )
    if any(type(one).complete is not Storage.complete for one in layer.transforms):
        raise ValueError("its weights are not the codes alone: some are kept in high precision")
    parts, rows = spec.segments(layer.weight_shape), layer.weight_shape[0]
    halves = (
        layer.scales.decode().expand(rows, -1).split([-(-part // (spec.granularity.size or part)) for part in parts], 1)
    )
    least = torch.stack([half.amin(1) for half in halves])
    shifts = [
        floor_exponent((half / of_half.unsqueeze(1)).contiguous()) for half, of_half in zip(halves, least, strict=True)
    ]
    values = (spec.fmt.decode(torch.arange(2**spec.fmt.bits, device=least.device)) / unit).to(torch.int32)
    weight = IntegerWeight(values, torch.cat(shifts, 1).to(torch.uint8), least * unit)
    fits = weight.largest <= INT8 or (
        weight.largest == INT8 + 1 and int(values.max()) << int(weight.shifts.max()) <= INT8
    )
    powers = zip(halves, least, shifts, strict=True)
    if not fits or not all(
        torch.equal(one.unsqueeze(1) * power_of_two(octaves), half) for half, one, octaves in powers
    ):
        raise ValueError(f"scales of an output ({spec.store}) differ by more than few octaves: use store: pow2:2")
    if not torch.equal(weight.scale / unit, least):
        raise ValueError("its scales are too small")
    return weight
