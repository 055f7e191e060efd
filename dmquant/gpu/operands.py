"""Weights and inputs as operands of integer and FP8 products: small multiples of a unit, and scales beside them.

The values of a narrow format are multiples of its smallest one: E2M1's 0 to 12 times 0.5, E2M3's 0 to 60 times 0.125.
Where all scales of a row are powers of two times one float32 (store `pow2`), the powers go into the multiples, and one
scale for each output channel is left: int32 holds the product of two such operands without error.
"""

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.formats import Format
from dmquant.grids import ScaledGrid
from dmquant.stores import power_of_two
from dmquant.transforms import Storage

E4M3 = torch.float8_e4m3fn
NAMES = {torch.int8: "int8", E4M3: "FP8 E4M3"}
FOLDED = ("pow2", "e8m0")  # stores of exponents, plus 127
EXACT_SUMS = 1 << 24  # integers up to here are float32s
_MOST_OCTAVES = 32


def keeps_expanded() -> bool:
    """Whether weights are kept at 8 bits (`speed`) or expanded for each call from packed codes (`memory`)."""
    return os.environ.get("DMQUANT_WEIGHTS") == "speed"


@functools.cache
def unit(fmt: Format, dtype: torch.dtype) -> float | None:
    """What values of `fmt` over it are exact in int8 or E4M3; None where `dtype` holds them in no unit.

    Integers, the smallest value being 1; in E4M3 the values themselves, where they are too large as integers.
    """
    for divisor in (fmt.min_positive, 1.0):
        if _holds(fmt, divisor, dtype):
            return divisor
    return None


@functools.cache
def octaves(fmt: Format, dtype: torch.dtype) -> tuple[int, int]:
    """The most octaves by which operands of `fmt` may grow, and shrink, and still be exact in `dtype`."""
    divisor = unit(fmt, dtype)
    return tuple(
        next(k for k in range(_MOST_OCTAVES) if not _holds(fmt, divisor * 2.0 ** (sign * (k + 1)), dtype))
        for sign in (-1, 1)
    )


def _holds(fmt: Format, divisor: float, dtype: torch.dtype) -> bool:
    scaled = fmt.values.double() / divisor
    limits = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
    inside = limits.min <= scaled.min() and scaled.max() <= limits.max
    return bool(inside) and torch.equal(scaled.to(dtype).double(), scaled)


def largest(fmt: Format) -> float:
    """The largest magnitude of `fmt` as a multiple of its smallest."""
    return fmt.values.abs().max().item() / fmt.min_positive


def why_no_inputs(activations: ActivationSpec | None, mixed: bool, dtype: torch.dtype) -> str | None:
    """Why inputs quantized like this are no operands in `dtype`; None where they are. `mixed`: by a convolution."""
    if activations is None:
        return "its input is not quantized"
    kind = activations.granularity.kind
    if unit(activations.fmt, dtype) is None:
        return f"activations in {activations.fmt.name} are not exact in {NAMES[dtype]}"
    if activations.split is not None:
        return "the halves of its input have scales of their own"
    if kind not in ("token", "tensor"):
        return f"activation scales for each {activations.granularity}: it takes one for a token, or for a tensor"
    if kind == "token" and mixed:
        return "a convolution sums over tokens of several scales: it takes activation granularity tensor"
    if activations.scale_by_row:
        return f"activation scales in store {activations.store} have a base for the whole row"
    return None


def why_no_weights(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the weights of a quantized layer are no operand in `dtype`; None where they are. Reads exponents stored."""
    spec = layer.weight_spec
    if spec.grid_type is not ScaledGrid:
        return "weights by tables of values are no multiples of a unit"
    if unit(spec.fmt, dtype) is None:
        return f"weights in {spec.fmt.name} are not exact in {NAMES[dtype]}"
    for transform in layer.transforms:
        if type(transform).complete is not Storage.complete:
            return f"transform {transform} adds to the weights that are in the codes"
    if spec.split is not None:
        return "the halves of its input have weight scales of their own"
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        return "it is a grouped convolution, or one that does not pad with zeros"
    if spec.store not in FOLDED:
        many = spec.scale_shape(layer.weight_shape)[1] > 1
        return f"weight scales in store {spec.store} for each {spec.granularity}: it takes pow2" if many else None
    if (found := span(layer)) > (most := sum(octaves(spec.fmt, dtype))):
        return f"weight scales of a row span {found} octaves: {NAMES[dtype]} holds {spec.fmt.name} times {most} at most"
    return None


def span(layer: nn.Module) -> int:
    """The octaves between the largest and the smallest scale of a row, over all rows; 0 without exponents."""
    if layer.weight_spec.store not in FOLDED or layer.scale.is_meta or not layer.scale.numel():
        return 0
    exponents = layer.scale.detach().int()
    return int((exponents.amax(1) - exponents.amin(1)).max())


@dataclass(frozen=True)
class Factors:
    """The scales of a weight as an operand.

    `channel` (out,) float32 multiplies the product. Codes stand for `table` (2^bits,) float32 multiples, each to be
    multiplied by 2^(stored - anchor), where there are exponents: `anchor` (out,) int32, else None.
    """

    channel: Tensor
    table: Tensor
    anchor: Tensor | None


def factors(layer: nn.Module, dtype: torch.dtype) -> Factors:
    """The scales of a layer's weights, which must be an operand in `dtype` (`why_no_weights`).

    In int8 the smallest scale of a row has the factor 1, since integers have room above; in E4M3 the largest has the
    largest factor that fits, since there it is below.
    """
    spec, rows, device = layer.weight_spec, layer.weight_shape[0], layer.qweight.device
    divisor = unit(spec.fmt, dtype)
    codes = torch.arange(1 << spec.fmt.bits, dtype=torch.uint8, device=device)
    table = (spec.fmt.decode(codes) / divisor).nan_to_num(0.0, 0.0, 0.0)
    if spec.store not in FOLDED:
        return Factors(layer.scales.decode().expand(rows, 1).flatten() * divisor, table, None)
    exponents = layer.scale.detach().to(torch.int32)
    up = octaves(spec.fmt, dtype)[0]
    anchor = exponents.amin(1) if dtype == torch.int8 else exponents.amax(1) - up
    half = (anchor - 127) // 2  # in two factors: one alone may be below the smallest normal float32
    channel = power_of_two(half) * power_of_two(anchor - 127 - half) * divisor
    base = 1.0 if layer.scale_base is None else layer.scale_base.detach().view(torch.float32).flatten()
    return Factors((channel * base).expand(rows).contiguous(), table, anchor.expand(rows).contiguous())
