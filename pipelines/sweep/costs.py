"""Arithmetic costs of a quantized model, by counting: bit operations, and the cells of a multiply-accumulate unit.

The cells are a gate-count model of ours, not a synthesis result: docs/sweep.md lists its omissions.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dmquant.convert import LayerPlan
from dmquant.formats import FloatFormat, Format, IntFormat
from dmquant.layers import QUANTIZED

BITS_LEFT_ALONE = 16  # of an operand that is not quantized


@dataclass(frozen=True)
class Costs:
    """Costs of the quantized layers in one call of the backbone for one image.

    `multiply_accumulates` count the float layers' products; `bit_operations` include branches in 16 bits.
    `multiplier_cells` and `accumulator_cells` are the cells of one multiply-accumulate unit, the mean over all
    multiply-accumulates; None where an operand is not quantized, or looked up in a table.
    """

    multiply_accumulates: int
    bit_operations: int
    multiplier_cells: float | None
    accumulator_cells: float | None

    @property
    def area(self) -> float | None:
        """Cells of one multiply-accumulate unit."""
        return None if self.multiplier_cells is None else self.multiplier_cells + self.accumulator_cells


def model_costs(plans: Sequence[LayerPlan], multiply_accumulates: dict[str, int], fan_in: dict[str, int]) -> Costs:
    """Costs of the planned layers; the two counts by layer come from `counting` and `fans_in`.

    A layer that is not called costs nothing.
    """
    called = {plan.name: plan for plan in plans if multiply_accumulates.get(plan.name)}
    total = sum(multiply_accumulates[name] for name in called)
    operations, multiplier, accumulator = 0, 0.0, 0.0
    has_area = bool(called)
    for name, plan in called.items():
        count, weights = multiply_accumulates[name], plan.weights.fmt
        activations = None if plan.activations is None else plan.activations.fmt
        operations += count * bits_of(weights) * bits_of(activations)
        for one in plan.transforms:  # `count` is positions times the size of the weight
            operations += count // math.prod(one.shape) * one.added_products() * BITS_LEFT_ALONE**2
        if not (_is_multiplied(weights) and _is_multiplied(activations)):
            has_area = False
            continue
        multiplier += count * multiplier_cells(weights, activations)
        accumulator += count * accumulator_cells(weights, activations, fan_in[name])
    if not has_area:
        return Costs(total, operations, None, None)
    return Costs(total, operations, multiplier / total, accumulator / total)


def bits_of(fmt: Format | None) -> int:
    """Bits of an operand; None stands for one that is left alone."""
    return BITS_LEFT_ALONE if fmt is None else fmt.bits


def multiplier_cells(weights: FloatFormat | IntFormat, activations: FloatFormat | IntFormat) -> int:
    """Full-adder cells of an array multiplier: partial products, and for two floats the adder of their exponents.

    (m_w + 1) (m_a + 1) + max(e_w, e_a) for floats of m mantissa and e exponent bits, b_w b_a for integers of b bits.
    A float meeting an integer counts with its m + 1, and the exponent passes through.
    """
    products = _significand(weights) * _significand(activations)
    both = [fmt.exponent for fmt in (weights, activations) if isinstance(fmt, FloatFormat)]
    return products + (max(both) if len(both) == 2 else 0)


def accumulator_cells(weights: FloatFormat | IntFormat, activations: FloatFormat | IntFormat, terms: int) -> int:
    """Bits, and so full adders, of a fixed-point register that holds any sum of `terms` products exactly (Kulisch).

    Every value is a multiple of its format's smallest one, so every product is of the product of these.
    """
    largest = math.prod(_largest(fmt) / fmt.min_positive for fmt in (weights, activations))
    return 1 + int(terms * largest).bit_length()


@contextlib.contextmanager
def counting(module: nn.Module) -> Iterator[dict[str, int]]:
    """The multiply-accumulates of each Linear and Conv2d of `module`, by name, added up over its calls in the block."""
    counts: dict[str, int] = {}

    def count(name: str):
        def add(layer: nn.Linear | nn.Conv2d, args: tuple, output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + output.numel() * layer.weight[0].numel()

        return add

    with contextlib.ExitStack() as stack:
        for name, layer in module.named_modules():
            if type(layer) in QUANTIZED:
                stack.callback(layer.register_forward_hook(count(name)).remove)
        yield counts


def fans_in(module: nn.Module) -> dict[str, int]:
    """The number of products that one output of each Linear and Conv2d of `module` adds up, by name."""
    return {name: layer.weight[0].numel() for name, layer in module.named_modules() if type(layer) in QUANTIZED}


def _is_multiplied(fmt: Format | None) -> bool:
    """Whether the multiplier sees the format's own bits."""
    return isinstance(fmt, FloatFormat | IntFormat)


def _significand(fmt: FloatFormat | IntFormat) -> int:
    return fmt.mantissa + 1 if isinstance(fmt, FloatFormat) else fmt.bits


def _largest(fmt: FloatFormat | IntFormat) -> float:
    return -fmt.min if isinstance(fmt, IntFormat) else fmt.max
