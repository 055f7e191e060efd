"""Synthetic layers on which roundings are compared: inputs of known correlation, and rows of unequal size."""

from dataclasses import replace

import torch
from torch import nn

from dmquant.calib.blocks.learn import Learned, learn
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import fit_grid
from dmquant.calib.objectives import UnitData, mse
from dmquant.convert import LayerPlan
from dmquant.grids import Grid
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Learning
from dmquant.rounding import Rounded, get_method, gptq

SAMPLES, TOKENS, HELD_OUT = 96, 16, 32


def inputs(kind: str, columns: int, generator: torch.Generator) -> torch.Tensor:
    """(SAMPLES, TOKENS, columns): `iid`, autoregressive over the columns (`ar`), or of `low-rank` with noise."""
    noise = torch.randn(SAMPLES * TOKENS, columns, generator=generator)
    if kind == "ar":
        for column in range(1, columns):
            noise[:, column] = 0.95 * noise[:, column - 1] + (1 - 0.95**2) ** 0.5 * noise[:, column]
    if kind == "low-rank":
        few = torch.randn(SAMPLES * TOKENS, columns // 8, generator=generator)
        noise = few @ torch.randn(columns // 8, columns, generator=generator) / few.shape[1] ** 0.5 + 0.1 * noise
    return noise.view(SAMPLES, TOKENS, columns)


def layer_of(columns: int = 64, rows: int = 48, seed: int = 0) -> nn.Linear:
    """A linear layer, normal, with rows of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, columns, generator=generator))
    layer.weight *= torch.randn(rows, 1, generator=generator).exp()
    return layer


def learned(method: str, kind: str, learning: dict, solve: bool = False, **options) -> tuple[Learned, Rounded, Grid]:
    """A method's learning of one layer in FP4 on inputs of a kind, on absmax scales of channels, in float32.

    With `solve` it begins with GPTQ's solution. The learning's end, what it kept, and the grid that it began on.
    """
    layer, module = layer_of(), get_method(method)
    x = inputs(kind, layer.in_features, torch.Generator().manual_seed(1))
    target, learning_rows = layer(x), x[: SAMPLES - HELD_OUT].flatten(0, 1)
    spec = WeightSpec.parse("fp4", "channel", "absmax", "fp32")
    grid = fit_grid(layer.weight, LayerPlan("layer", spec, None), None)
    if solve:
        grid = solved(grid, learning_rows)
    learner = Learner(
        "layer",
        layer,
        grid,
        module.start(grid, module.Options(**options)),
        QUANTIZED[nn.Linear].like(layer, spec, None, device="meta"),
    )
    data = UnitData(
        lambda batch, _: learner.forward(x[list(batch)]),
        lambda batch: target[list(batch)],
        range(SAMPLES - HELD_OUT),
        range(SAMPLES - HELD_OUT, SAMPLES),
    )
    done, kept = learn("layer", [learner], mse.start(data, mse.Options()), Learning(**learning), lambda *_: None)
    return done, kept["layer"], grid


def solved(grid: Grid, x: torch.Tensor) -> Grid:
    """A grid with GPTQ's solution for inputs (n, columns), refined by one sweep."""
    moments, options = [x.T @ x], gptq.Options(sweeps=1)
    solution = gptq.start(grid, options, moments).values
    return replace(grid, solution=solution, wanted=gptq.wanted(grid, moments, options, solution))
