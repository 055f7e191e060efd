"""Weights and inputs as operands of one byte: `dmquant.operands` for int8, and what E4M3 holds exactly beside that.

E4M3 has integers up to 16, and larger ones with as many digits, but it goes on below 1: where all scales of a row are
powers of two times one float32, it holds up to 14 octaves of them with FP4 values, int8 three. The powers go into the
operand, and one scale for each output channel is left.
"""

import functools
from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.formats import Format
from dmquant.grids import ScaledGrid
from dmquant.operands import unit_of
from dmquant.stores import floor_exponent, power_of_two
from dmquant.transforms import Storage

E4M3 = torch.float8_e4m3fn
NAMES = {torch.int8: "int8", E4M3: "FP8 E4M3"}
EXACT_SUMS = 1 << 24  # integers up to here are float32s
_MOST_OCTAVES = 32


@functools.lru_cache(maxsize=64)
def unit(fmt: Format, dtype: torch.dtype) -> float | None:
    """What values of `fmt` over it are exact in int8 or E4M3; None where `dtype` holds them in no unit.

    Integers, the smallest value being 1; in E4M3 the values themselves, where they are too large as integers.
    """
    if dtype == torch.int8:
        return unit_of(fmt)
    power_of_2 = frexp(fmt.min_positive)[0] == 0.5
    return next((one for one in (fmt.min_positive, 1.0) if power_of_2 and _holds(fmt, one, dtype)), None)


@functools.lru_cache(maxsize=64)
def octaves(fmt: Format, dtype: torch.dtype) -> tuple[int, int]:
    """By how many octaves operands of `fmt` can grow, and shrink, and still be exact in `dtype`."""
    divisor = unit(fmt, dtype)
    ways = [[_holds(fmt, divisor * 2.0 ** (sign * k), dtype) for k in range(1, _MOST_OCTAVES)] for sign in (-1, 1)]
    return ways[0].index(False), ways[1].index(False)


def _holds(fmt: Format, divisor: float, dtype: torch.dtype) -> bool:
    scaled = fmt.values.double() / divisor
    limits = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
    inside = limits.min <= scaled.min().item() and scaled.max().item() <= limits.max
    return inside and torch.equal(scaled.to(dtype).double(), scaled)


def largest(fmt: Format) -> float:
    """The largest magnitude of `fmt` as a multiple of its smallest."""
    return fmt.values.abs().max().item() / fmt.min_positive


def why_no_inputs(spec: ActivationSpec | None, mixed: bool, dtype: torch.dtype) -> str | None:
    """Why inputs quantized so are no operand; None where they are. `mixed`: an output sums over several tokens."""
    if spec is None:
        return "its inputs are not quantized"
    kind = spec.granularity.kind
    if unit(spec.fmt, dtype) is None:
        return f"inputs in {spec.fmt.name} are not exact in {NAMES[dtype]}"
    if spec.split is not None:
        return "the halves of its inputs have scales of their own"
    if kind not in ("token", "image", "tensor"):
        return f"inputs have a scale for every {spec.granularity}: it takes one a token, an image or a tensor"
    if kind == "token" and mixed:
        return "a scale for every pixel cannot be taken out of a sum over pixels"
    if kind == "token" and spec.scale_by_row:
        return f"scales of tokens in store {spec.store} have a base for the whole image"
    return None


@dataclass(frozen=True)
class Operand:
    """A weight's matrix form (outputs, columns) by its codes: channel[o] * table[code] * 2^(shifts - anchor), exactly.

    `table`, float32 (2^bits,), are multiples of the format's unit. `shifts`, uint8 (outputs, groups), and `anchor`,
    int32 (outputs,), are None where an output has one scale. `channel` is float32 (outputs,).
    """

    channel: Tensor
    table: Tensor
    shifts: Tensor | None
    anchor: Tensor | None

    @property
    def span(self) -> int:
        """The octaves between the largest and the smallest scale of an output."""
        return 0 if self.shifts is None else int(self.shifts.max())


def operand(layer: nn.Module, dtype: torch.dtype) -> Operand:
    """A quantized layer's weight as an operand; ValueError, which says why, where it is none in `dtype`.

    In int8 the smallest scale of an output has the factor 1, since integers have room above; in E4M3 the largest has
    the largest factor that fits.
    """
    spec = layer.weight_spec
    divisor = unit(spec.fmt, dtype) if spec.grid_type is ScaledGrid else None
    if divisor is None:
        tables = "" if spec.grid_type is ScaledGrid else " tables"
        raise ValueError(f"weights in {spec.fmt.name}{tables} are not exact in {NAMES[dtype]}")
    if any(type(one).complete is not Storage.complete for one in layer.transforms):
        raise ValueError("its weights are not the codes alone: some are kept in high precision")
    if spec.split is not None:
        raise ValueError("the halves of its inputs have weight scales of their own")
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError("it takes convolutions of one group, padded with zeros")
    codes = torch.arange(1 << spec.fmt.bits, dtype=torch.uint8, device=layer.qweight.device)
    table = (spec.fmt.decode(codes) / divisor).nan_to_num(0.0, 0.0, 0.0)
    scale = layer.scales.decode().expand(layer.weight_shape[0], -1)
    if scale.shape[1] == 1:
        return Operand(scale.flatten() * divisor, table, None, None)
    least = scale.amin(1, keepdim=True)
    shifts = floor_exponent((scale / least).contiguous()).clamp(max=_MOST_OCTAVES)
    up, down = octaves(spec.fmt, dtype)
    if not torch.equal(least * power_of_two(shifts), scale):
        raise ValueError(f"scales of an output ({spec.store}) are no powers of two times one: use store: pow2")
    if (found := int(shifts.max())) > up + down:
        raise ValueError(
            f"scales of an output span {found} octaves, {NAMES[dtype]} holds {up + down}: use store: pow2:2"
        )
    anchor = shifts.amax(1) - up if dtype == E4M3 else torch.zeros_like(shifts[:, 0])
    return Operand(least.flatten() * power_of_two(anchor) * divisor, table, shifts.to(torch.uint8), anchor)
