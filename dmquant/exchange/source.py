"""A model that dmquant saved, read a layer at a time."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.exchange.tensor_file import Reader
from dmquant.host import weight_file
from dmquant.layers import QUANTIZED, QuantConv2d, QuantLinear
from dmquant.recipe import Recipe
from dmquant.scaling import Scales
from dmquant.stores import get_store


@dataclass(frozen=True)
class Importance:
    """What an error of each input channel costs, as calibration data tells."""

    mean_squares: Mapping[str, Tensor]
    """Of the channels of a layer's input, (channels,) float32, by the layer's name."""
    calls: int
    """Calls of the backbone that they were measured on."""


class Source:
    """The backbone of a pipeline folder: the model on the meta device, with empty quantized layers, and its files.

    `component` is the backbone's name in the pipeline folder `folder`. `importance` is there where an export asks
    for it and calibration data is at hand.
    """

    def __init__(self, backbone: nn.Module, recipe: Recipe, files: Sequence[Path], folder: Path, component: str):
        self.backbone, self.recipe, self.folder, self.component = backbone, recipe, folder, component
        self.importance: Importance | None = None
        self._reader = Reader(files)
        kinds = tuple(QUANTIZED.values())
        self.layers: Mapping[str, QuantLinear | QuantConv2d] = {
            name: layer for name, layer in backbone.named_modules() if isinstance(layer, kinds)
        }
        """The quantized layers by name: their shapes, `weight_spec`, `activations`, `transforms`; without values."""
        of_layers = {f"{name}.{part}" for name, layer in self.layers.items() for part in layer._parameters}
        self.rest: tuple[str, ...] = tuple(name for name in self._reader if name not in of_layers)
        """Names of the tensors that belong to no quantized layer."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of the backbone's config.json in full precision."""
        return {"_class_name": type(self.backbone).__name__, **self.backbone.config}

    def header(self, name: str) -> weight_file.Tensor:
        """Dtype and shape of a tensor by its name in the files."""
        return self._reader.header(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, read now; UserError where the files lack it."""
        if name not in self._reader:
            raise UserError(f"{self.folder} lacks the tensor '{name}': get that model again")
        return self._reader.tensor(name)

    def scales(self, name: str) -> Tensor:
        """Decoded scales of a quantized layer, float32 (scale rows, scale columns); nothing else of it is read."""
        layer = self.layers[name]
        store = layer.weight_spec.store
        base = None if layer.scale_base is None else self.tensor(f"{name}.scale_base").view(torch.float32)
        return Scales(self.tensor(f"{name}.scale").view(get_store(store).dtype), base, store).decode()

    def layer(self, name: str) -> QuantLinear | QuantConv2d:
        """A quantized layer with its codes, scales, bias and tensors of transforms, read now."""
        filled = copy.copy(self.layers[name])
        parameters = {
            part: None if empty is None else nn.Parameter(self.tensor(f"{name}.{part}"), requires_grad=False)
            for part, empty in self.layers[name]._parameters.items()
        }
        vars(filled)["_parameters"] = parameters
        return filled
