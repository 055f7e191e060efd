"""The interfaces of a transform: storage, fit and correction, the folding of a pair, and a record of them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dmquant.errors import UsageError
from dmquant.transforms.pair import Pair

Parts = dict[str, Tensor]
"""The tensors that one transform stores with a layer, by name."""


@dataclass(frozen=True)
class Part:
    """Shape and dtype of a tensor that a transform stores with a layer."""

    shape: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """The tensors of one transform in a layer, and how the layer runs with them. This one is the identity.

    Parts follow from shape and options alone, so that an empty layer can be made before its file is read. `Parts` hold
    them by name, in their dtypes. Weights are (output channels, input channels of a group, ...), as `shape`.
    """

    options: Any
    shape: tuple[int, ...]
    split: int | None = None
    """The input is a concatenation: its first `split` channels and the others share no scale."""

    name: ClassVar[str]
    STAGE: ClassVar[int]
    """Transforms of a layer apply in this order."""
    CHANGES_INPUT: ClassVar[bool] = False
    """Whether the quantized input differs from the layer's own."""
    timestep_ranges: ClassVar[int] = 1
    """The number of timestep ranges with parts of their own."""
    GROUPED: ClassVar[bool] = True
    """Whether a grouped convolution can have it: not where its parts run over all input channels."""

    def check(self, layer: nn.Linear | nn.Conv2d) -> None:
        """UsageError for a layer that cannot have this transform."""
        if not self.GROUPED and isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise UsageError(
                f"transform {self.name} is not for grouped convolutions: give this layer `transforms: []` in a rule"
            )

    def parts(self) -> dict[str, Part]:
        """Shapes and dtypes of the stored tensors, by name."""
        return {}

    def to_quantize(self, weight: Tensor, parts: Parts) -> Tensor:
        """The weight to quantize, from the float layer's (out, in, ...); float32, same shape."""
        return weight

    def complete(self, weight: Tensor, parts: Parts) -> Tensor:
        """The weight that multiplies the input, from the dequantized weight (out, in, ...); same dtype and shape."""
        return weight

    def undo(self, weight: Tensor, parts: Parts) -> Tensor:
        """The float layer's weight, from the one that multiplies the input, (out, in, ...); float32, same shape."""
        return weight

    def input(self, x: Tensor, parts: Parts, dim: int) -> Tensor:
        """The input to quantize, from the layer's own, (rows, ...) with channels along `dim`; same dtype and shape."""
        return x

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
        """Add to the output `y`, perhaps in place; same shape. `x` is what `input` is given, not quantized."""
        return y

    def added_products(self) -> int:
        """Products of two 16-bit numbers that `add_to` takes for each position of the output."""
        return 0

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class InputStatistics:
    """Summary of a layer's input on calibration data.

    `absmax`: the largest magnitude of each channel in each timestep range, float32 (ranges, channels). `sample`: some
    of the inputs, (rows, ...) in their own dtype.
    """

    absmax: Tensor
    sample: Sequence[Tensor]


@dataclass(frozen=True)
class Fit:
    """The fit of a transform by calibration before codes are final. This one gives zeros, which change nothing."""

    statistics: int = 0
    """Timestep ranges that its `InputStatistics` tell apart; 0: it uses no statistics."""
    optional: bool = False
    """Whether calibration may leave a layer without the transform, where its output is nearer then."""
    turns: int = 0
    """The number of times it is fitted anew to the error of the codes beside it (`alternate`)."""
    by_moments: bool = False
    """Whether that error is weighted by the second moments of the layer's input."""

    def candidates(self, storage: Storage, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        """Parts for a weight (out, in, ...) float32, to choose from by output error; only one without statistics."""
        return [{name: weight.new_zeros(part.shape, dtype=part.dtype) for name, part in storage.parts().items()}]

    def refit(self, storage: Storage, lost: Tensor, seen: Tensor) -> Parts:
        """Parts for the error `lost` of codes, float32 in the weight's shape, and the output's, `seen` (rows, n)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Residuals:
    """Errors of a layer whose codes are decided.

    `weight`: the weight before rounding less the weight after, float32 (output channels, ...). `inputs`: mean
    magnitude of each channel of the transformed input, float32 (channels,). `outputs`: mean over samples and positions
    of the float layer's output less the quantized one's, float32 (timestep ranges, output channels).
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor


Correction = Callable[[Any, Residuals], Parts]
"""A transform's storage and the errors of rounding -> the parts that correct them."""


@dataclass(frozen=True)
class Folding:
    """The folding of a transform of a pair's second layers into the weights of both, so that nothing is stored.

    `factors(pair, statistics)` are the candidate factors of the channels, each float32 (channels,). With `chosen`
    calibration takes the one of least output error, block by block, the first without statistics. Otherwise the first
    is taken, for all pairs of the model, before anything else.
    """

    factors: Callable[[Pair, InputStatistics | None], list[Tensor]]
    chosen: bool


@dataclass(frozen=True)
class Method:
    """A transform as `register` takes it: all but its storage depends on the options of a layer."""

    Options: type[BaseModel]
    """Options of the transform in a recipe."""
    storage: type[Storage]
    fit: Callable[[Any], Fit] = lambda options: Fit()
    correction: Callable[[Any], Correction | None] = lambda options: None
    folding: Callable[[Any], Folding | None] = lambda options: None
    loses: Callable[[Any], bool] = lambda options: False
    """Whether it changes the function of the layer, so that roundings have to learn back what is lost."""

    def takes_data(self, options: Any) -> bool:
        """Whether a layer with these options needs calibration data."""
        fit = self.fit(options)
        return bool(fit.statistics or fit.by_moments or self.correction(options))


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Values of the input channels in the shape (1, in, ...), to broadcast to a weight (out, in, ...); same dtype."""
    return values.reshape(1, -1, *[1] * (weight.ndim - 2))
