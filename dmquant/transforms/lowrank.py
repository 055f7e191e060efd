"""Low rank: a branch of rank r in 16 bits beside the codes, which takes the input before it is quantized.

`of: weight`: the branch is the largest part of the weight, the rest is quantized; then branch and codes are fitted in
turn to the weight less the other (SVDQuant, arXiv 2411.05007). With `by: output` the error is the output's, as in
CALDERA (arXiv 2405.18886), instead of the weight's.
`of: error`: the branch is the largest part of the error of rounding, with input channels weighted by the mean magnitude
of their activations (L2QER, arXiv 2402.02446).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from dmquant.errors import UsageError
from dmquant.transforms.interfaces import Fit, InputStatistics, Method, Part, Parts, Residuals, Storage, per_channel


class Options(BaseModel, extra="forbid"):
    """Options of the low-rank branch in a recipe."""

    rank: int = Field(default=16, ge=1)
    """At most the smaller side of the weight's matrix."""
    of: Literal["weight", "error"] = "weight"
    iterations: int = Field(default=10, ge=0)
    """Times that a branch of the weight and the codes are fitted to each other."""
    by: Literal["weight", "output"] = "weight"
    """The error that the iterations minimize: of the weight, or of the output for inputs as in calibration."""

    @model_validator(mode="after")
    def _of_the_weight(self) -> "Options":
        if self.of == "error" and (names := sorted({"iterations", "by"} & self.model_fields_set)):
            raise UsageError(f"`of: error` takes no {' and no '.join(names)}: such a branch is fitted once")
        return self


class LowRank(Storage):
    """y = W^ x^ + up (down x)."""

    name = "lowrank"
    STAGE = 30
    GROUPED = False

    @property
    def rank(self) -> int:
        return min(self.options.rank, self.shape[0], self.columns)

    @property
    def columns(self) -> int:
        """Columns of the weight's matrix."""
        return math.prod(self.shape[1:])

    def parts(self) -> dict[str, Part]:
        up, down = (self.shape[0], self.rank), (self.rank, self.columns)
        return {"up": Part(up, torch.bfloat16), "down": Part(down, torch.bfloat16)}

    def to_quantize(self, weight: Tensor, parts: Parts) -> Tensor:
        return weight - self._branch(parts)

    def undo(self, weight: Tensor, parts: Parts) -> Tensor:
        return weight + self._branch(parts)

    def _branch(self, parts: Parts) -> Tensor:
        return (parts["up"].float() @ parts["down"].float()).view(self.shape)

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
        up, down = parts["up"].to(y.dtype), parts["down"].to(x.dtype)
        if len(self.shape) == 2:
            hidden = F.linear(x, down)
        else:
            convolved: Any = layer._conv_forward(x, down.view(-1, *self.shape[1:]), None)
            hidden = convolved.movedim(-3, -1)
        hidden, outputs = hidden.to(y.dtype).reshape(-1, self.rank), y.movedim(layer.channel_dim, -1)
        if y.requires_grad or not outputs.is_contiguous():  # autograd forbids to write into what a kernel returns
            return y + (hidden @ up.T).view(outputs.shape).movedim(-1, layer.channel_dim)
        # A product and then a sum take three times as long, nearly all of it for memory.
        outputs.view(-1, self.shape[0]).addmm_(hidden, up.T)
        return y

    def added_products(self) -> int:
        return self.rank * (self.shape[0] + self.columns)

    def __str__(self) -> str:
        return f"lowrank:{self.rank}"


class LargestPart(Fit):
    """The branch nearest to the weight, then to the error of the codes."""

    def candidates(self, storage: LowRank, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        return [self.refit(storage, weight, weight.flatten(1))]

    def refit(self, storage: LowRank, lost: Tensor, seen: Tensor) -> Parts:
        return nearest(lost, seen, storage.rank)


def nearest(weight: Tensor, seen: Tensor, rank: int) -> Parts:
    """The branch U (U^T W) of least output error, U the first left singular vectors of `seen`.

    `weight` W is float32 (rows, ...), `seen` float32 (rows, n), its matrix times a root of the input's moments.
    """
    up = _left_vectors(seen, rank)
    return {"up": up.bfloat16(), "down": (up.T @ weight.flatten(1)).bfloat16()}


def correct(storage: LowRank, residuals: Residuals) -> Parts:
    """L2QER (arXiv 2402.02446): the branch nearest to the error E by the norm of E S, S = diag(mean |x|)."""
    importance = residuals.inputs.clamp(min=1e-6 * residuals.inputs.amax().clamp(min=1e-30))
    columns = per_channel(importance, residuals.weight).expand(1, *storage.shape[1:]).flatten(1)
    return nearest(residuals.weight, residuals.weight.flatten(1) * columns, storage.rank)


def _left_vectors(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors (rows, count), from the smaller Gram matrix: an SVD takes far longer."""
    if len(matrix) <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -count:]
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -count:]
    return torch.linalg.qr(matrix @ right).Q


def _fit(options: Options) -> Fit:
    if options.of == "error":
        return Fit()
    return LargestPart(turns=options.iterations, by_moments=options.by == "output" and options.iterations > 0)


METHOD = Method(Options, LowRank, fit=_fit, correction=lambda options: correct if options.of == "error" else None)
