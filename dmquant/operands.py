"""Operands of exact products: formats whose values are small integers times a unit, and weights that are."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.formats import FloatFormat, Format, IntFormat
from dmquant.grids import ScaledGrid
from dmquant.stores import get_store
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

    W[o, c] = scale[o] * values[code] * factors[o, group of c], exactly. The second half of a split weight goes on with
    groups of its own.
    """

    values: Tensor
    """Integers by code, int32 (2^bits,)."""
    factors: Tensor
    """uint8 (outputs, groups)."""
    scale: Tensor
    """float32 (outputs,)."""

    @property
    def largest(self) -> int:
        """The largest magnitude that a code and a factor can make."""
        return int(self.values.abs().max()) * int(self.factors.max())

    def tables(self) -> Tensor:
        """The integers by factor, from 0 to the largest, and code, int8 (factors, 2^bits)."""
        return torch.stack([self.values * factor for factor in range(int(self.factors.max()) + 1)]).to(torch.int8)


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
    scale = layer.scales.decode().expand(layer.weight_shape[0], -1)
    least = layer.scales.base if get_store(spec.store).factors else scale.amin(1, keepdim=True)
    least = least.expand(len(scale), 1)
    factors = (scale / least).round().clamp(max=INT8 + 1).to(torch.uint8)
    values = (spec.fmt.decode(torch.arange(2**spec.fmt.bits, device=scale.device)) / unit).to(torch.int32)
    weight = IntegerWeight(values, factors, least.squeeze(1) * unit)
    fits = weight.largest <= INT8 or (weight.largest == INT8 + 1 and int(values.max()) * int(factors.max()) <= INT8)
    if not fits or not torch.equal(least * factors, scale):
        raise ValueError(f"scales of an output ({spec.store}) are no small multiples of one: use store: int")
    if not torch.equal(weight.scale / unit, least.squeeze(1)):
        raise ValueError("its scales are too small")
    return weight
