"""Operands of exact products: formats whose values are small integers times a unit, and weights that are."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

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

    W[o, c] = scale[half of c, o] * factors[o, group of c] * values[code], exactly; without a split there is one half.
    """

    values: Tensor
    """Integers by code, int32 (2^bits,)."""
    factors: Tensor
    """uint8 (outputs, groups)."""
    scale: Tensor
    """float32 (halves, outputs)."""

    @property
    def most(self) -> int:
        """The largest factor."""
        return int(self.factors.max())

    @property
    def largest(self) -> int:
        """The largest magnitude that a code and a factor can make."""
        return int(self.values.abs().max()) * self.most

    def tables(self) -> Tensor:
        """The integers by factor and code, int8 (factors, 2^bits), from factor 0 up to the largest."""
        return (torch.arange(self.most + 1, device=self.values.device).unsqueeze(1) * self.values).to(torch.int8)


def integer_weight(layer: nn.Module) -> IntegerWeight:
    """The integers of a quantized layer's weight; ValueError, which says why, where it has no such form in int8."""
    spec, scales = layer.weight_spec, layer.scales
    if isinstance(scales.stored, FakeTensor):
        raise ValueError("its codes cannot be read while torch.export captures it")
    unit = unit_of(spec.fmt) if spec.grid_type is ScaledGrid else None
    if unit is None:
        kind = spec.fmt.name if spec.grid_type is ScaledGrid else "tables"
        raise ValueError(f"weights in {kind} are no small integers")
    if any(type(one).complete is not Storage.complete for one in layer.transforms):
        raise ValueError("its weights are not the codes alone: some are kept in high precision")
    parts, rows = spec.segments(layer.weight_shape), layer.weight_shape[0]
    groups = [math.ceil(part / (spec.granularity.size or part)) for part in parts]
    of_halves = scales.decode().expand(rows, -1).split(groups, 1)
    if get_store(spec.store).factors:
        units, factors = [scales.base] * len(parts), scales.stored.expand(rows, -1).split(groups, 1)
    else:
        units = [half.amin(1, keepdim=True) for half in of_halves]
        factors = [(half / least).round() for half, least in zip(of_halves, units, strict=True)]
    whole = all(
        torch.equal(one * times.float(), half) for one, times, half in zip(units, factors, of_halves, strict=True)
    )
    values = (spec.fmt.decode(torch.arange(2**spec.fmt.bits, device=scales.stored.device)) / unit).to(torch.int32)
    together = torch.cat(factors, 1)
    whole = whole and bool((together >= 1).all())
    if not whole or int(values.max()) * together.max() > INT8 or int(values.min()) * together.max() < -INT8 - 1:
        raise ValueError(f"scales of an output in {spec.store} are no small multiples of one: use store: int")
    weight = IntegerWeight(values, together.to(torch.uint8), torch.cat(units, 1).expand(rows, -1).T.contiguous() * unit)
    if not torch.equal(weight.scale.T / unit, torch.cat(units, 1).expand(rows, -1)):
        raise ValueError("its scales are too small")
    return weight
