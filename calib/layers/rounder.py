"""A recipe's rounding method, and how a layer starts on it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dmquant.calib.layers.fitting import fit_to_codes
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import Moments, fit_grid, moments_for, needs_moments
from dmquant.convert import LayerPlan
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.recipe import Recipe
from dmquant.rounding import gptq, nearest


@dataclass(frozen=True)
class Rounder:
    """A method of `dmquant.rounding` with its options."""

    method: Any
    options: BaseModel
    solver: Any
    """The method that scales are fitted to: what a method that learns begins with, by default the method itself."""
    solver_options: BaseModel
    later: bool = False
    """Whether the method learns after the march, from the codes that the march leaves: nearest or solved ones."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Rounder":
        own, solver = recipe.rounding, recipe.rounding.solver
        later = own.definition.LEARNS and recipe.learning.unit == "model"
        return cls(own.definition, own.checked, solver.definition, solver.checked, later)

    @property
    def learns(self) -> bool:
        """Whether the units of the march are learned."""
        return self.method.LEARNS and not self.later

    @property
    def solving(self) -> BaseModel:
        """Options of solving by moments: GPTQ's defaults where a transform needs moments but the method does not."""
        return self.solver_options if self.solver.NEEDS_MOMENTS else gptq.Options()

    def moments_for(self, layer: nn.Module, plan: LayerPlan, device: torch.device) -> Moments | None:
        """Empty moments to collect a layer's inputs in; None where nothing needs them."""
        return moments_for(layer, plan, self.solver, self.solving, device)

    def start(
        self,
        layer: nn.Linear | nn.Conv2d,
        plan: LayerPlan,
        quantized: QuantLinear | QuantConv2d,
        weight: Tensor,
        moments: Moments | None,
    ) -> Learner:
        """The learner of a layer, with its grid fitted and its rounding started, or solved.

        `weight` is the result of `fit_transforms`, (out, in, ...) float32. A layer without moments takes scales of
        least weight error, the recipe's own format, and nearest rounding where the method needs moments.
        """
        weight = fit_to_codes(plan, quantized, weight, moments, self.solver, self.solving)
        if moments is None and needs_moments(plan):
            plan = replace(plan, weights=replace(plan.weights, scale="mse"), candidates=())
        grid = fit_grid(weight, plan, moments, self.solver_options)
        solved = None
        if self.solver.NEEDS_MOMENTS:
            if moments is not None and moments.in_full:
                solved = self.solver.start(grid, self.solver_options, moments.blocks())
            else:
                solved = nearest.start(grid, nearest.Options())
        if solved is None or self.method is not self.solver:
            if solved is not None and moments is not None and moments.in_full:
                wanted = gptq.wanted(grid, moments.blocks(), self.solving, solved.values)
                grid = replace(grid, solution=solved.values, wanted=wanted)
            if not self.later:
                rounding = self.method.start(grid, self.options)
            else:
                rounding = solved or nearest.start(grid, nearest.Options())
        else:
            rounding = solved
        return Learner(plan.name, layer, grid, rounding, quantized)
