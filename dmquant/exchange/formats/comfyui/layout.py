"""What the formats of a layer in ComfyUI's files have in common: how layers are gathered, and tensors are checked."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.formats.comfyui.computing import EngineLinear, Steps
from dmquant.exchange.interfaces import ForeignLayer, Found
from dmquant.exchange.keys import Target
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import Entry, stored
from dmquant.host import weight_file
from dmquant.layers import QuantLinear
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.scaling import Scales
from dmquant.transforms import Storage

RECIPE = "quantize with --for comfyui"
FLOAT_PRODUCT = "full_precision_matrix_mult"
"""In a layer's settings: its weight is decoded, and its input is not rounded."""


@dataclass(frozen=True)
class Group:
    """A layer of the file: quantized layers that are its rows, one where nothing is fused; read part by part."""

    name: str
    """In the file."""
    source: Source
    target: Target

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names in dmquant's model."""
        return tuple(name.removesuffix(".weight") for name in self.target.sources)

    @property
    def layers(self) -> list[QuantLinear]:
        """Without values."""
        return [self.source.layers[name] for name in self.names]

    @property
    def first(self) -> QuantLinear:
        return self.layers[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer in the file."""
        return sum(layer.weight_shape[0] for layer in self.layers), self.first.weight_shape[1]

    def parts(self, part: str) -> list[Tensor]:
        """A parameter of each layer, as stored, such as `qweight`."""
        return [self.source.tensor(f"{name}.{part}") for name in self.names]

    def rows(self, part: str) -> Tensor:
        """A parameter whose rows are the output channels, of all layers; as stored."""
        return self.target.rows(self.parts(part))

    def scales(self) -> list[Tensor]:
        """Decoded scales of each layer, float32 (scale rows, scale columns)."""
        return [self.source.scales(name) for name in self.names]

    def shared(self, part: str, what: str) -> Tensor:
        """A parameter that all layers must have in common; UserError, naming the layers, where they differ."""
        first, *others = self.parts(part)
        if any(not torch.equal(first, other) for other in others):
            raise UserError(f"ComfyUI has {', '.join(self.names)} as one layer, but their {what} differ: {RECIPE}")
        return first

    def entry(self, part: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Entry:
        """A tensor of this layer in the file."""
        return Entry(f"{self.name}.{part}", dtype, shape, make)

    def scalar(self, part: str, value: Tensor) -> Entry:
        """A tensor of one float32 number, of no dimension."""
        return stored(f"{self.name}.{part}", value.view(torch.float32).reshape(()).clone())

    def static_scale(self) -> list[Entry]:
        """The tensor of the input's static scale, where there is one."""
        if not self.first.is_static:
            return []
        return [self.scalar("input_scale", self.shared("input_scale", "static scales of the input"))]


@dataclass(frozen=True)
class Opened:
    """A quantized layer of a file: its name, its settings, and the headers of the file."""

    found: Found
    name: str
    settings: Mapping[str, Any]

    def shape(self, part: str, *dtypes: str) -> tuple[int, ...]:
        """Shape of a tensor of the layer; UserError where it is missing or of another dtype than these."""
        name = f"{self.name}.{part}"
        if (header := self._header(part)) is None:
            raise UserError(f"{self.found.path}: layer {self.name} is {self.format}, but has no {part}: get it again")
        if header.dtype not in dtypes:
            raise UserError(
                f"{self.found.path}: {name} is {header.dtype}, and {self.format} has {' or '.join(dtypes)}: "
                "the layer is mislabelled"
            )
        return header.shape

    def unfit(self, part: str, shape: tuple[int, ...]) -> UserError:
        """The error of a tensor whose shape the format does not have."""
        return UserError(
            f"{self.found.path}: {self.name}.{part} has the shape {list(shape)}, which {self.format} does not have: "
            "the layer is mislabelled, or in another layout"
        )

    def matrix(self, part: str, *dtypes: str) -> tuple[int, int]:
        """`shape`, and UserError for one that is no matrix."""
        shape = self.shape(part, *dtypes)
        if len(shape) != 2 or 0 in shape:
            raise self.unfit(part, shape)
        return shape

    def expect(self, part: str, shapes: Sequence[tuple[int, ...]], *dtypes: str) -> tuple[int, ...]:
        """`shape`, and UserError for one that is none of these."""
        if (shape := self.shape(part, *dtypes)) not in shapes:
            raise self.unfit(part, shape)
        return shape

    def has(self, part: str) -> bool:
        return self._header(part) is not None

    def scalar(self, part: str) -> Callable[[], Tensor] | None:
        """Reads a tensor of one float32 number; None where there is none."""
        if not self.has(part):
            return None
        self.expect(part, [(), (1,)], "F32")
        return lambda: self.tensor(part)

    def tensor(self, part: str) -> Tensor:
        """A tensor of the layer as stored, read now."""
        return self.found.tensor(f"{self.name}.{part}")

    @property
    def format(self) -> str:
        return self.settings["format"]

    def option(self, name: str, default: int) -> int:
        """A whole number of the settings, where they may stand by themselves or in `params`."""
        inner = self.settings.get("params")
        value = self.settings.get(name, inner.get(name, default) if isinstance(inner, dict) else default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.found.path}: layer {self.name} has {name} {value!r}: a whole number is expected")
        return value

    @property
    def in_float(self) -> bool:
        """Whether the layer's input is left as it is."""
        return bool(self.settings.get(FLOAT_PRODUCT))

    def layer(
        self,
        shape: tuple[int, int],
        parts: Sequence[str],
        weight: Callable[[], Tensor],
        activations: ActivationSpec,
        static: Callable[[], Tensor] | None = None,
        steps: Callable[[ActivationSpec | None], Steps] | None = None,
    ) -> ForeignLayer:
        """The layer with a weight of this shape in these tensors, which rounds its input so where it does at all.

        `static` reads the static scale of the input, and `steps` what else belongs to the layer.
        """
        nbytes = sum(header.end - header.begin for part in parts if (header := self._header(part)))
        of_input = None if self.in_float else activations
        scale = None if self.in_float or static is None else lambda: static().view(torch.float32).reshape(1, 1)

        def build(layer: nn.Module) -> nn.Module:
            return EngineLinear(layer, steps(of_input), None if scale is None else scale())

        return ForeignLayer(self.name, self.format, shape, nbytes, weight, of_input, scale, steps and build)

    def _header(self, part: str) -> weight_file.Tensor | None:
        return self.found.tensors.get(f"{self.name}.{part}")


class Layout(ABC):
    """A format of a layer in ComfyUI's files."""

    name: ClassVar[str]
    """In the layer's settings."""
    transforms: ClassVar[frozenset[str]] = frozenset()
    """Names of dmquant's transforms that it has tensors for."""
    packed: ClassVar[bool] = False
    """Whether the weight as stored is narrower than the layer's input."""
    inputs: tuple[ActivationSpec, ...] = ()
    """How ComfyUI rounds inputs: without static scales first, where it can."""
    float_product: ClassVar[bool] = True
    """Whether ComfyUI can leave the input as it is."""

    @abstractmethod
    def holds(self, spec: WeightSpec) -> bool:
        """Whether weights of this specification are weights of this format."""

    def misfit(self, shape: tuple[int, int], spec: WeightSpec) -> str | None:
        """Why a layer with a weight of this shape, (out, in), does not fit, as of "it"; None where it does."""
        return None

    def unfit_transforms(self, transforms: tuple[Storage, ...]) -> str | None:
        """Why a layer with these transforms does not fit, as of "it"; None where it does."""
        other = next((one for one in transforms if one.name not in self.transforms), None)
        return other and f"has the transform {other}, for which {self.name} has no place"

    @abstractmethod
    def entries(self, group: Group) -> list[Entry]:
        """Tensors of the layer in the file, beside bias and settings."""

    def settings(self, group: Group) -> dict[str, Any]:
        """Settings of the layer beside its format."""
        return {}

    @abstractmethod
    def open(self, layer: Opened) -> ForeignLayer:
        """The layer of a file; UserError for tensors that are not of this format."""


def split_within(spec: WeightSpec, size: int) -> str | None:
    """Why a layer whose scales start anew where its input is split has no plain groups of this size; None: it has."""
    return f"has scales that start anew at input {spec.split} (split)" if (spec.split or 0) % size else None


def of_engine(format: str, granularity: str = "token", scale: str = "online") -> ActivationSpec:
    """Inputs as ComfyUI rounds them."""
    return ActivationSpec.parse(format, granularity, scale=scale, engine="comfyui")


def decoded(codes: Tensor, stored_scales: Tensor, base: Tensor | None, spec: WeightSpec) -> Tensor:
    """The weight (out, in), float32, of packed codes, uint8, and scales, both as dmquant stores them."""
    shape = len(codes), codes.shape[1] * 8 // spec.fmt.bits
    return QuantizedTensor(codes, Scales(stored_scales, base, spec.store), spec, shape).dequantize()
