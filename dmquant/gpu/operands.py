"""Weights and inputs as operands of one byte: small multiples of a unit, in int8 or, where it holds them, in E4M3.

Scales of groups that are multiples of one float32 for each output go into the operand, which leaves that one: whole
numbers (stores of factors), or powers of two. E4M3 has few digits, but it goes on below 1: with FP4 values it holds 14
octaves of powers of two, and int8 three.
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
from dmquant.stores import get_store, power_of_two
from dmquant.transforms import Storage

E4M3 = torch.float8_e4m3fn
NAMES = {torch.int8: "int8", E4M3: "FP8 E4M3"}
POWERS = ("pow2", "e8m0")  # stores of exponents, plus 127
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
    if spec.refused:
        return spec.refused
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
    """A weight's matrix form by its codes: channel[output] * (table[code] * shift[output] * factors[stored scale]).

    What stands in brackets is the operand, exact in its dtype. Float32: `channel` (outputs,), `table` (2^bits,),
    `factors` (256,), `shift` (outputs,), powers of two; the last two are None where an output has one scale.
    """

    channel: Tensor
    table: Tensor
    factors: Tensor | None
    shift: Tensor | None
    most: int
    """The largest scale of an output over its smallest, or, where scales are whole numbers, over 1."""


def operand(layer: nn.Module, dtype: torch.dtype) -> Operand:
    """A quantized layer's weight as an operand; ValueError, which says why, where it is none in `dtype`."""
    spec, rows, device = layer.weight_spec, layer.weight_shape[0], layer.qweight.device
    divisor = unit(spec.fmt, dtype) if spec.grid_type is ScaledGrid else None
    if divisor is None:
        kind = spec.fmt.name if spec.grid_type is ScaledGrid else "tables"
        raise ValueError(f"weights in {kind} are not exact in {NAMES[dtype]}")
    if any(type(one).complete is not Storage.complete for one in layer.transforms):
        raise ValueError("its weights are not the codes alone: some are kept in high precision")
    if spec.split is not None:
        raise ValueError("the halves of its inputs have weight scales of their own")
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError("it takes convolutions of one group, padded with zeros")
    every = torch.arange(256, dtype=torch.uint8, device=device)
    table = (spec.fmt.decode(every[: 1 << spec.fmt.bits]) / divisor).nan_to_num(0.0, 0.0, 0.0)
    scales, store = layer.scales, get_store(spec.store)
    if scales.stored.shape[1] == 1:
        return Operand(scales.decode().detach().expand(rows, 1).flatten() * divisor, table, None, None, 1)
    found = scales.stored.detach()
    if store.factors is not None:
        used = found.unique().tolist()
        if not all(_holds(spec.fmt, divisor / factor, dtype) for factor in used):
            raise ValueError(f"{spec.fmt.name} times {used[-1]} and less is not exact in {NAMES[dtype]}")
        base = scales.base.detach().flatten()
        return Operand(base * divisor, table, every.float(), torch.ones_like(base), used[-1])
    if spec.store not in POWERS:
        raise ValueError(f"scales of an output in store {spec.store} are no multiples of one: use store: pow2:2")
    highest, lowest = (ends.int().expand(rows) for ends in (found.amax(1), found.amin(1)))
    up, down = octaves(spec.fmt, dtype)
    if (span := int((highest - lowest).max())) > up + down:
        raise ValueError(f"scales of an output span {span} octaves, {NAMES[dtype]} holds {up + down}: use pow2:2")
    # In int8 the smallest scale has the factor 1, in E4M3 the largest has the largest that fits.
    anchor = lowest if dtype == torch.int8 else highest - up
    half = (anchor - 127) // 2  # in two steps: one power of two may be below the smallest normal float32
    channel = power_of_two(half) * power_of_two(anchor - 127 - half) * divisor
    channel = channel if scales.base is None else channel * scales.base.detach().flatten()
    shift = power_of_two(-half) * power_of_two(127 - anchor + half)
    return Operand(channel, table, power_of_two(every.int().clamp(1, 254) - 127), shift, 1 << span)
