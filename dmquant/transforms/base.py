"""What a transform of one layer is, and what it may look at."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmquant.errors import UsageError
from dmquant.transforms.pair import Pair


@dataclass(frozen=True)
class Part:
    """A tensor that a transform stores with a layer: its two-dimensional shape and its dtype."""

    shape: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw of a layer's input.

    `absmax`: the largest magnitude of each channel in each of the ranges of timesteps that the layer's transforms want
    told apart, float32 (ranges, channels). `sample`: some of the inputs themselves, as the layer gets them.
    """

    absmax: Tensor
    sample: Sequence[Tensor]


@dataclass(frozen=True)
class Residuals:
    """What is wrong with a layer once its codes are decided.

    `weight`: the weight that was to be quantized less the quantized one. `inputs`: the mean magnitude of each channel
    of the input, after the transforms. `outputs`: the mean over samples and positions of the float layer's output less
    the quantized one's on the same input, (timestep ranges, output channels).
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Transform:
    """A change of one layer that leaves its function as it is. This one changes nothing: a method overrides its share.

    What a layer of some shape stores (`parts`) follows from shape and options, so that an empty layer can be made
    before its file is read. Parts come to the methods below by these names, in their dtypes.
    """

    options: Any
    shape: tuple[int, ...]
    """Of the layer's weight, (output channels, input channels of a group, ...)."""
    split: int | None = None
    """The input is a concatenation: its first `split` channels and the others share no scale."""

    STAGE: ClassVar[int] = 0
    """Transforms of a layer apply in this order."""
    WHOLE_MODEL: ClassVar[bool] = False
    """Whether `prepare_` changes weights, so that it needs all of them."""
    CHANGES_INPUT: ClassVar[bool] = False
    """Whether what is quantized is another input than the layer's own."""

    @classmethod
    def takes_data(cls, options: Any) -> bool:
        """Whether fitting it takes calibration data."""
        return False

    @classmethod
    def corrects(cls, options: Any) -> bool:
        """Whether it is fitted to what rounding left wrong (`correct`), after it."""
        return False

    @classmethod
    def weighs_by_moments(cls, options: Any) -> bool:
        """Whether what codes leave counts, in its turns, by the second moments of the layer's input."""
        return False

    @classmethod
    def prepare_(cls, module: nn.Module, layers: Collection[str]) -> None:
        """Change the float weights of a whole model in place, before anything else; `layers` have this transform."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def check(self, layer: nn.Linear | nn.Conv2d) -> None:
        """UsageError for a layer that cannot have this transform."""

    def parts(self) -> dict[str, Part]:
        """What the layer stores."""
        return {}

    def fit(self, weight: Tensor, statistics: InputStatistics | None) -> list[dict[str, Tensor]]:
        """Parts for a float32 weight: the candidates to choose from by output error, one where there is no choice.

        Without statistics (data-free, or the layer was never called) the parts that change nothing.
        """
        return [{}]

    def to_quantize(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """What of the weight is to be quantized; float32."""
        return weight

    def complete(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The weight that the input meets, from the dequantized one; same dtype."""
        return weight

    def undo(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The float layer's weight from a float32 one that meets the transformed input."""
        return weight

    def input(self, x: Tensor, parts: dict[str, Tensor], dim: int) -> Tensor:
        """The input to be quantized, channels along `dim`; same dtype."""
        return x

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The output `y` with what is added to it, perhaps in place; `x`: the transformed input, not quantized."""
        return y

    def correct(self, residuals: Residuals) -> dict[str, Tensor]:
        """Parts that make up for what rounding left wrong."""
        raise NotImplementedError

    def turns(self) -> int:
        """How many times it is fitted anew to what the codes beside it leave (`alternating`)."""
        return 0

    def refit(self, left: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """Parts for what codes leave of a float32 weight, in its shape; `seen` (rows, n): what outputs see of that."""
        raise NotImplementedError

    def ranges(self) -> int:
        """Timestep ranges that its parts differ by."""
        return 1

    def observed_ranges(self) -> int:
        """Timestep ranges that the statistics it is fitted to tell apart."""
        return 1

    def added_products(self) -> int:
        """Products of two 16-bit numbers that `add_to` takes for each position of the output."""
        return 0

    def optional(self) -> bool:
        """Whether calibration may leave a layer without it, where its output is nearer then."""
        return False

    def folds(self) -> bool:
        """Whether calibration lets the layer before take it over, by one of `factors`, where that is exact."""
        return False

    def factors(self, pair: Pair, statistics: InputStatistics | None) -> list[Tensor]:
        """What the channels of a pair may be multiplied by, each float32 (channels,); the first changes nothing."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Values of the input channels, shaped to broadcast to a weight (output channels, input channels, ...)."""
    return values.reshape(1, -1, *[1] * (weight.ndim - 2))


def refuse_groups(transform: Transform, layer: nn.Linear | nn.Conv2d) -> None:
    """UsageError for a grouped convolution: for methods whose parts run over all input channels."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise UsageError(
            f"transform {transform.name} is not for grouped convolutions: give this layer `transforms: []` in a rule"
        )
