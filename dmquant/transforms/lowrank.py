"""Low rank: a branch of rank r in 16 bits beside the codes, which takes the input before it is quantized.

`of: weight`: the branch is the largest part of the weight, the rest is quantized; then the branch is fitted to what the
codes leave of the weight, the codes to what the branch leaves, and so on (SVDQuant, arXiv 2411.05007). `by: output`
lets an error count by what the output sees of it, as CALDERA (arXiv 2405.18886) does.
`of: error`: the branch is the largest part of what rounding lost, input channels weighed by the mean magnitude of their
activations (L2QER, arXiv 2402.02446).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from dmquant.errors import UsageError
from dmquant.transforms.base import InputStatistics, Part, Residuals, Transform, per_channel, refuse_groups


class Options(BaseModel):
    """What a recipe may set."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=16, ge=1)
    """At most the smaller side of the weight's matrix."""
    of: Literal["weight", "error"] = "weight"
    iterations: int = Field(default=10, ge=0)
    """Times that a branch of the weight and the codes are fitted to each other."""
    by: Literal["weight", "output"] = "weight"
    """What these make least: the error of the weight, or that of the output for inputs like those of calibration."""

    @model_validator(mode="after")
    def _of_the_weight(self) -> "Options":
        if self.of == "error" and (names := sorted({"iterations", "by"} & self.model_fields_set)):
            raise UsageError(f"`of: error` takes no {' and no '.join(names)}: such a branch is fitted once")
        return self


class LowRank(Transform):
    """y = W^ x^ + up (down x)."""

    STAGE = 30

    @classmethod
    def takes_data(cls, options: Options) -> bool:
        return options.of == "error" or cls.weighs_by_moments(options)

    @classmethod
    def weighs_by_moments(cls, options: Options) -> bool:
        return options.by == "output" and options.iterations > 0

    @classmethod
    def corrects(cls, options: Options) -> bool:
        return options.of == "error"

    def check(self, layer: nn.Linear | nn.Conv2d) -> None:
        refuse_groups(self, layer)

    @property
    def rank(self) -> int:
        return min(self.options.rank, self.shape[0], self._columns)

    @property
    def _columns(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    def parts(self) -> dict[str, Part]:
        up, down = (self.shape[0], self.rank), (self.rank, self._columns)
        return {"up": Part(up, torch.bfloat16), "down": Part(down, torch.bfloat16)}

    def fit(self, weight: Tensor, statistics: InputStatistics | None) -> list[dict[str, Tensor]]:
        if self.options.of == "weight":
            return [self.refit(weight, weight.flatten(1))]
        return [{name: weight.new_zeros(part.shape, dtype=part.dtype) for name, part in self.parts().items()}]

    def turns(self) -> int:
        return self.options.iterations if self.options.of == "weight" else 0

    def refit(self, left: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """With U the first left singular vectors of what is seen, U U^T `left` is nearest to it among this rank's."""
        up = _left_vectors(seen, self.rank)
        return {"up": up.bfloat16(), "down": (up.T @ left.flatten(1)).bfloat16()}

    def correct(self, residuals: Residuals) -> dict[str, Tensor]:
        """The best approximation of E S, S the diagonal of the channels' mean magnitudes, with S taken out again."""
        importance = residuals.inputs.clamp(min=1e-6 * residuals.inputs.amax().clamp(min=1e-30))
        columns = per_channel(importance, residuals.weight).expand(1, *self.shape[1:]).flatten(1)
        return self.refit(residuals.weight, residuals.weight.flatten(1) * columns)

    def to_quantize(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return weight - self._branch(parts) if self.options.of == "weight" else weight

    def undo(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return weight + self._branch(parts)

    def _branch(self, parts: dict[str, Tensor]) -> Tensor:
        return (parts["up"].float() @ parts["down"].float()).view(self.shape)

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        up, down = parts["up"].to(y.dtype), parts["down"].to(x.dtype)
        if len(self.shape) == 2:
            hidden = F.linear(x, down)
        else:
            convolved: Any = layer._conv_forward(x, down.view(-1, *self.shape[1:]), None)
            hidden = convolved.movedim(-3, -1)
        hidden, outputs = hidden.to(y.dtype).reshape(-1, self.rank), y.movedim(layer.channel_dim, -1)
        if not outputs.is_contiguous():
            return y + (hidden @ up.T).view(outputs.shape).movedim(-1, layer.channel_dim)
        # A product and then a sum take three times as long, nearly all of it for memory.
        outputs.view(-1, self.shape[0]).addmm_(hidden, up.T)
        return y

    def added_products(self) -> int:
        return self.rank * (self.shape[0] + self._columns)

    def __str__(self) -> str:
        return f"lowrank:{self.rank}"


def _left_vectors(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors (rows, count), from the smaller Gram matrix: an SVD takes far longer."""
    if len(matrix) <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -count:]
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -count:]
    return torch.linalg.qr(matrix @ right).Q


METHOD = LowRank
