"""One option for every layer, of least cost within a number of bytes: a mixed-integer program, solved exactly."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from dmquant.errors import UserError

GAP = 1e-4  # relative, between the choice and the best that there could be


@dataclass(frozen=True)
class Choice:
    """An option by layer, with its bytes and its cost, the sum of the layers'."""

    options: Mapping[str, str]
    bytes: int
    cost: float


def cheapest(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], most: int) -> Choice:
    """The choice of least cost that takes at most `most` bytes.

    `costs` and `sizes` (bytes) are by layer and option. It is the multiple-choice knapsack problem; HiGHS solves it, to
    within GAP of the least cost. Raises UserError where nothing is small enough.
    """
    if (least := smallest(sizes)) > most:
        raise UserError(f"these options take {least} bytes at least, not {most}")
    pairs = [(layer, option) for layer, of_layer in costs.items() for option in of_layer]
    cost = numpy.array([costs[layer][option] for layer, option in pairs])
    size = numpy.array([sizes[layer][option] for layer, option in pairs], dtype=float)
    rows = {layer: number for number, layer in enumerate(costs)}
    places = ([rows[layer] for layer, _ in pairs], range(len(pairs)))
    one_each = csr_array((numpy.ones(len(pairs)), places), shape=(len(rows), len(pairs)))
    scale = cost.max() or 1.0
    solution = milp(
        cost / scale,
        integrality=numpy.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / most, -numpy.inf, 1)],
        options={"mip_rel_gap": GAP},
    )
    if solution.x is None:
        raise UserError(f"no choice was found within {most} bytes: {solution.message}")
    chosen = {layer: option for (layer, option), taken in zip(pairs, solution.x, strict=True) if taken > 0.5}
    return Choice(chosen, total(sizes, chosen), sum(costs[layer][option] for layer, option in chosen.items()))


def total(sizes: Mapping[str, Mapping[str, int]], chosen: Mapping[str, str]) -> int:
    """Bytes of a choice."""
    return sum(sizes[layer][option] for layer, option in chosen.items())


def smallest(sizes: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of the smallest choice."""
    return sum(min(of_layer.values()) for of_layer in sizes.values())


def uniform(sizes: Mapping[str, Mapping[str, int]], costs: Mapping[str, Mapping[str, float]]) -> dict[str, Choice]:
    """The choices that give all layers one option, by that option, as far as all layers have it."""
    common = set.intersection(*(set(of_layer) for of_layer in sizes.values()))
    first = next(iter(sizes.values()))
    return {
        option: Choice(
            dict.fromkeys(sizes, option),
            sum(of_layer[option] for of_layer in sizes.values()),
            sum(costs[layer][option] for layer in sizes),
        )
        for option in first
        if option in common
    }
