"""Second moments of a layer's inputs, H = mean x x^T, and the error of its output by them."""

import math
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from dmquant.calib.layers.hessian import fit_hessian
from dmquant.calib.layers.lean import fit_lean
from dmquant.convert import LayerPlan
from dmquant.errors import UsageError
from dmquant.grids import Grid
from dmquant.qtensor import WeightSpec
from dmquant.rounding import gptq
from dmquant.scaling import DATA_RULES, absmax, from_matrix, to_groups, to_matrix
from dmquant.transforms import fit_of

LARGEST = (
    8192  # columns of a layer whose moments are kept in full if nothing demands it; beyond, those inside its groups
)
STRIP = (
    128  # columns of a block of moments: with narrower ones matrix products slow down, wider ones waste more of them
)
POSITIONS = 256  # tokens or pixels taken of a row of the batch


class Moments:
    """Sums of x x^T over inputs (tokens, columns), in full or in blocks along the diagonal; float32.

    `sums` (blocks, size, size) are in the order of the columns of the weight's matrix form, with its split; the last
    block is padded with zeros. They are symmetric: each STRIP rows are added up from the diagonal on, and what lies
    below is copied once it is asked for. `together` is the largest number of columns in a block, where moments are
    needed in full. Without it moments serve scales and formats alone, and wide layers have a block for each group.
    """

    def __init__(self, shape: tuple[int, ...], spec: WeightSpec, device: torch.device, together: int | None = None):
        """`shape` is the weight's, (rows, input channels, ...)."""
        self.columns, self.in_full = math.prod(shape[1:]), together is not None
        self.order, group = None, spec.granularity.size or 1
        if spec.split is not None:
            numbers = from_matrix(torch.arange(self.columns).view(1, -1), (1, *shape[1:]))
            self.order = to_matrix(numbers, spec.split)[0].to(device)
        self.size = self.columns
        if self.in_full:
            blocks = -(-self.columns // together)
            self.size = min(-(-self.columns // (blocks * group)) * group, self.columns)
        elif self.columns > LARGEST and (spec.split is None or not spec.segments(shape)[0] % group):
            self.size = spec.granularity.size or self.columns  # groups are blocks, but for a split amid one
        blocks = -(-self.columns // self.size)
        self.sums = torch.zeros(blocks, self.size, self.size, device=device, dtype=torch.float32)
        self.tokens = 0
        self._factors: tuple[gptq.Options, list[gptq.Factor]] | None = None

    def add(self, x: Tensor) -> None:
        """Count the inputs `x` (tokens, columns), any dtype, in the order of the matrix form without a split."""
        x = x.float() if self.order is None else x[:, self.order].float()
        if self.size <= STRIP:
            blocks = F.pad(x, (0, -self.columns % self.size)).view(len(x), -1, self.size).transpose(0, 1)
            self.sums.baddbmm_(blocks.transpose(1, 2), blocks)
        else:
            for sums, block in zip(self.sums, x.split(self.size, 1), strict=True):
                for first in range(0, block.shape[1], STRIP):
                    right, last = block[:, first:], first + STRIP
                    sums[first:last, first : block.shape[1]].addmm_(right[:, :STRIP].T, right)
        self.tokens += len(x)

    def blocks(self) -> list[Tensor]:
        """The sums of one block of columns after another, each (its columns, its columns), without padding."""
        self._mirror()
        widths = [min(self.size, self.columns - first) for first in range(0, self.columns, self.size)]
        return [sums[:width, :width] for sums, width in zip(self.sums, widths, strict=True)]

    def _mirror(self) -> None:
        """Copy what was added up above the diagonal to below it."""
        for last in range(STRIP, self.size, STRIP):
            strip = slice(last - STRIP, last)
            self.sums[:, last:, strip] = self.sums[:, strip, last:].transpose(1, 2)

    def factors(self, options: gptq.Options) -> list[gptq.Factor]:
        """`gptq.factorize` of the blocks, once for the same options; nothing may be added any more."""
        if self._factors is None or self._factors[0] != options:
            self._factors = options, gptq.factorize(self.blocks(), options)
        return self._factors[1]

    def inside_groups(self, spec: WeightSpec, shape: tuple[int, ...]) -> Tensor:
        """Mean moments within the groups of a weight of this shape, (groups, n, n) float32, padded with 0."""
        numbers = torch.arange(1, self.columns + 1, device=self.sums.device).view(1, -1)
        groups = to_groups(numbers, spec.granularity, spec.segments(shape)).squeeze(0)
        self._mirror()
        sums = self.sums / max(self.tokens, 1)
        if spec.split is None and groups.shape == sums.shape[:2]:
            return sums
        block, place = (groups - 1).clamp(min=0) // self.size, (groups - 1).clamp(min=0) % self.size
        one, other = groups.unsqueeze(2), groups.unsqueeze(1)
        known = (one > 0) & (other > 0) & (block.unsqueeze(2) == block.unsqueeze(1))
        return sums[block.unsqueeze(2), place.unsqueeze(2), place.unsqueeze(1)].where(known, 0.0)

    def output_error(self, error: Tensor) -> float:
        """Mean squared error of the output, summed over rows, for a weight's error in matrix form (rows, columns)."""
        self._mirror()
        parts = F.pad(error, (0, -self.columns % self.size)).view(len(error), -1, self.size).transpose(0, 1)
        return float((torch.bmm(parts, self.sums) * parts).sum() / max(self.tokens, 1))


def moments_for(
    layer: nn.Module, plan: LayerPlan, method: ModuleType, options: BaseModel, device: torch.device
) -> Moments | None:
    """Empty moments to collect a layer's inputs in; None where nothing needs them.

    They are in full where the rounding `method` or a transform needs them, in blocks of at most `options.columns`
    columns, an option of GPTQ. A convolution without `has_columns` is left to nearest rounding then.
    """
    needed = method.NEEDS_MOMENTS or any(fit_of(one).by_moments for one in plan.transforms)
    demanded = needed and has_columns(layer)
    if not demanded and (plan.weights.scale == "lean" or not needs_moments(plan)):
        return None
    return Moments(tuple(layer.weight.shape), plan.weights, device, options.columns if demanded else None)


def has_columns(layer: nn.Module) -> bool:
    """Whether all output channels multiply the same inputs, and `columns_of` can list them."""
    return isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def alike(x: Tensor) -> Tensor:
    """`x` (rows, ...) with each row of the batch divided by its RMS, float32: no timestep weighs more for its size.

    Rows of one backbone call have different timesteps.
    """
    rms = x.float().flatten(1).square().mean(1).sqrt().clamp(min=1e-30)
    return x.float() / rms.view(-1, *(1,) * (x.ndim - 1))


def columns_of(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """im2col: the inputs that each output position multiplies, (positions, columns), in the dtype of `x`.

    `x` is a layer's input, (rows, ..., in) or (rows, in, height, width). Columns are in the order of the weight's
    matrix form without a split. At most POSITIONS of each row's tokens or pixels are taken, the same in every call.
    Raises UsageError for a convolution of several groups, or padded otherwise than with numbers of zeros.
    """
    if isinstance(layer, nn.Linear):
        return (x if x.ndim < 3 else x[..., some_of(x.shape[-2], POSITIONS, x.device), :]).flatten(0, -2)
    if layer.groups != 1:
        raise UsageError("scales by output error are not for grouped convolutions: give them scale: mse in a rule")
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UsageError("scales by output error are for convolutions with numeric zero padding: use scale: mse")
    return _patches(layer, x)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs under the kernel at some output positions: (positions, kernel height * width * channels)."""
    (down, right), (high, wide) = layer.stride, layer.kernel_size
    padded = F.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2).movedim(1, -1).contiguous()
    rows = torch.arange(high, device=x.device) * layer.dilation[0]
    columns = torch.arange(wide, device=x.device) * layer.dilation[1]
    height = (padded.shape[1] - (high - 1) * layer.dilation[0] - 1) // down + 1
    width = (padded.shape[2] - (wide - 1) * layer.dilation[1] - 1) // right + 1
    chosen = some_of(height * width, POSITIONS, x.device).view(-1, 1, 1)
    places = (chosen // width * down + rows.view(-1, 1)) * padded.shape[2] + chosen % width * right + columns
    patches = padded.flatten(1, 2).index_select(1, places.flatten())  # whole pixels, channel by channel
    return patches.view(len(x) * len(chosen), -1)


def some_of(count: int, most: int, device: torch.device) -> Tensor:
    """Indices of at most `most` of `count` tokens or pixels, (n,) int64, random but the same at every call."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].to(device)


def fit_grid(weight: Tensor, plan: LayerPlan, moments: Moments | None, options: BaseModel | None = None) -> Grid:
    """The grid of a weight (rows, input channels, ...), any dtype: its scales fitted, the best of its formats taken.

    The candidate format of the least output error at nearest rounding is taken. `options` are the options of the
    rounding method, for scales that are fitted to that method.
    """
    matrix, shape = to_matrix(weight.detach().float(), plan.weights.split), tuple(weight.shape)
    specs = [replace(plan.weights, fmt=fmt) for fmt in plan.candidates] or [plan.weights]
    grids = [_fit(matrix, spec, shape, moments, options) for spec in specs]
    if len(grids) == 1:
        return grids[0]
    return min(grids, key=lambda grid: moments.output_error(grid.nearest - matrix))


def needs_moments(plan: LayerPlan) -> bool:
    """Whether the scales or the format of a layer are fitted to moments."""
    return plan.weights.scale in DATA_RULES or bool(plan.candidates)


def _fit(
    matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], moments: Moments | None, options: BaseModel | None
) -> Grid:
    shared = spec.amplitude is not None and spec.granularity.kind == "tensor"
    if spec.scale == "lean" and not shared:
        return fit_lean(matrix, spec, shape, moments.factors(options))
    if spec.scale == "hessian" and not shared:
        groups = to_groups(matrix, spec.granularity, spec.segments(shape))
        base = None if spec.amplitude is None else spec.base(absmax(groups))
        scales = fit_hessian(groups, spec.fmt, spec.store, moments.inside_groups(spec, shape), base)
    else:
        scales = spec.grid_type.fit(matrix, spec, spec.segments(shape))
    return spec.grid_type(matrix, spec, scales, shape)
