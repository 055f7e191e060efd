"""A quantized layer that learns: its codes, scales, bias and low-rank branch, computed as the layer itself computes."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmquant.calib.layers.learner import PRODUCTS, StraightThrough
from dmquant.calib.tuning.held import Held, as_stored, storable
from dmquant.calib.tuning.optimizers import Lean
from dmquant.calib.tuning.rounding import Grouped, RoundedWeight, StoredScale
from dmquant.grids import Grid
from dmquant.grids.scaled import ScaledGrid
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.qtensor import QuantizedTensor
from dmquant.rounding.straight import can_move, moved
from dmquant.transforms import Parts, Storage

BRANCH = "lowrank"
LORA_RANK = 16
_TINY = torch.finfo(torch.float32).tiny


Hold = Callable[[str, Tensor, Lean | None], Held]
"""Begins to hold values of a kind of what is trained."""


class TunedLayer:
    """A quantized layer while it is tuned; `train` names what of it learns, as far as it has that.

    Latent weights begin at the layer's own codes, in units of the mean step between two codes of their group, so that
    one rate suits all layers and formats; a LoRA is a low-rank change of the latent weights, and ends in the codes as
    well. Scales are multiples of those that the layer begins with. Without latent weights codes stay as they are, and
    scales move under them.
    """

    def __init__(self, layer: QuantLinear | QuantConv2d, train: frozenset[str], lean: Lean | None, hold: Hold):
        self.layer, self.spec = layer, layer.weight_spec
        self._scales, self._grouped = layer.scales, Grouped(self.spec, layer.weight_shape)
        self._is_scaled = self.spec.grid_type is ScaledGrid
        self._step = 1.0
        if self._is_scaled:
            values = self.spec.fmt.values
            self._step = float(values[-1] - values[0]) / (len(values) - 1)
        begun = self._begun()
        self.held: dict[str, Held] = {}
        if "weights" in train:
            self.held["weights"] = hold("weights", begun, lean)
        if "lora" in train:
            rank = min(LORA_RANK, *begun.shape)
            draw = torch.Generator().manual_seed(rank)
            drawn = torch.randn(rank, begun.shape[1], generator=draw, dtype=torch.float32) / rank**0.5
            self.held["up"] = hold("lora", begun.new_zeros(begun.shape[0], rank), None)
            self.held["down"] = hold("lora", drawn.to(begun.device), None)
        if "scales" in train and can_move(self.spec):
            self.held["scales"] = hold("scales", torch.ones_like(self._scales.decode()), None)
        if "biases" in train and layer.bias is not None:
            self.held["bias"] = hold("biases", layer.bias, None)
            self._bias_dtype = storable(layer.bias)
        for transform in layer.transforms:
            if "branch" in train and transform.name == BRANCH:
                parts = layer.parts(transform)
                self.held |= {f"branch.{name}": hold("branch", part.float(), None) for name, part in parts.items()}

    @property
    def moves_codes(self) -> bool:
        """Whether weights may go to other codes."""
        return not self.held.keys().isdisjoint(("weights", "up"))

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer for an input of any float dtype, as the layer computes it; differentiable."""
        given = [x]
        for transform in self.layer.transforms:
            given.append(transform.input(given[-1], self.parts(transform), self.layer.channel_dim))
        y = PRODUCTS[type(self.layer)](given[-1], self)
        for transform, x in zip(self.layer.transforms, given[:-1], strict=True):
            y = transform.add_to(y, self.layer, x, self.parts(transform))
        return y

    def parts(self, transform: Storage) -> Parts:
        """Tensors of a transform, those that learn as they will be stored."""
        parts = self.layer.parts(transform)
        if transform.name != BRANCH or "branch.up" not in self.held:
            return parts
        return {name: as_stored(self.held[f"branch.{name}"].read(), part.dtype) for name, part in parts.items()}

    # The interface of a layer towards kernels

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), in the layer's dtype, or None."""
        if "bias" not in self.held:
            return self.layer.bias
        return as_stored(self.held["bias"].read(), self._bias_dtype).to(self.layer.bias.dtype)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantize a transformed input, with a straight-through gradient; same shape and dtype."""
        if self.layer.activations is None:
            return x
        return StraightThrough.apply(x, self.layer.quantize_input)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight to compute with, in `dtype` and the layer's shape, (out, in, ...)."""
        values = self._values().to(dtype)
        weight = self._grid(values).as_weight(values)
        for transform in self.layer.transforms:
            weight = transform.complete(weight, self.parts(transform))
        return weight

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.layer._conv_forward(x, weight, bias)

    @torch.no_grad()
    def commit_(self) -> None:
        """Give the layer what was learned: codes, scales, bias and branch, as they were computed with."""
        scales, values = self._scales, self._values()
        if "scales" in self.held:
            scales = moved(scales, self.spec.fmt, self.held["scales"].values())
        grid = self.spec.grid_type(values, self.spec, scales, self.layer.weight_shape)
        parts = {one.name: self.parts(one) for one in self.layer.transforms if one.name == BRANCH}
        bias = self.bias
        self.layer.drop_kernel_weights()
        self.layer.load_quantized(QuantizedTensor.of(grid, values), bias)
        self.layer.load_parts(
            {name: {part: tensor.to(torch.bfloat16) for part, tensor in of.items()} for name, of in parts.items()}
        )

    def _values(self) -> Tensor:
        """Values of the grid (rows, columns), float32; differentiable."""
        began = scale = self._scales.decode()
        if "scales" in self.held:
            scale = StoredScale.apply(self.held["scales"].read(), self._scales, self.spec)
        if self.moves_codes:
            latent = self.held["weights"].read() if "weights" in self.held else self._begun()
            if "up" in self.held:
                latent = latent + self.held["up"].read() @ self.held["down"].read()
            if self._is_scaled:
                return RoundedWeight.apply(latent, scale, began * self._step, self.spec, self._grouped)
            latent = latent * self._unit()
            return latent + (self._grid(latent.detach()).nearest - latent.detach())
        if "scales" in self.held:
            codes = self._grouped.split(self._decoded(torch.ones_like(scale)))
            return self._grouped.join(codes * scale.unsqueeze(-1))
        return self._decoded(began)

    def _begun(self) -> Tensor:
        """The values that the layer began with, in units of the mean step of their row or group; (rows, columns)."""
        scale = self._scales.decode()
        if self._is_scaled:
            return self._decoded(torch.ones_like(scale)) / self._step
        return self._decoded(scale) / self._unit()

    def _decoded(self, scale: Tensor) -> Tensor:
        return self.spec.grid_type.decode(self.layer.qweight, scale, self.spec, self._grouped.segments)

    def _unit(self) -> Tensor:
        """The mean step of each row of a grid without scales, (rows, 1)."""
        return self._grid(self._decoded(self._scales.decode())).step.abs().mean(1, keepdim=True).clamp(min=_TINY)

    def _grid(self, matrix: Tensor) -> Grid:
        return self.spec.grid_type(matrix, self.spec, self._scales, self.layer.weight_shape)
