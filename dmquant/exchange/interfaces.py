"""What a format of another engine is: how it is written, recognised and read, and which layers its engine takes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import Reader
from dmquant.host import weight_file
from dmquant.qtensor import WeightSpec

Progress = Callable[[int, int], None]
"""Told of bytes written and bytes in all."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    """The file or folder."""
    formats: Mapping[str, int]
    """The number of layers by the target's name of their format; layers in high precision under `high precision`."""
    exact: bool
    """Whether what the reader decodes is, bit for bit, what dmquant decodes."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each, such as key names that stay those of diffusers."""


@dataclass(frozen=True)
class Found:
    """Files with weights, of which nothing but headers and configuration was read."""

    path: Path
    """The file or folder that was named."""
    files: tuple[Path, ...]
    """The safetensors files."""
    tensors: Mapping[str, weight_file.Tensor]
    """Dtype, shape and place of each tensor by its name in the files."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """`__metadata__` of the files' headers."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json beside the files; empty for a single file."""
    load: Callable[[weight_file.Tensor], Tensor] | None = None
    """Reads a tensor of a file that is no safetensors file; None where all are."""

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, read now; UserError for a name that is not there."""
        if self.load is not None and name in self.tensors:
            return self.load(self.tensors[name])
        if self.load is None and name in self._reader:
            return self._reader.tensor(name)
        raise UserError(f"{self.path} lacks the tensor '{name}': get that file again")

    @functools.cached_property
    def _reader(self) -> Reader:
        return Reader(self.files)


@dataclass(frozen=True)
class ForeignLayer:
    """A quantized layer of a file of another engine."""

    name: str
    """Its module's name in the file."""
    format: str
    """The engine's name of its format, such as `nvfp4`."""
    shape: tuple[int, ...]
    """Shape of the weight, (out, in, ...)."""
    nbytes: int
    """Bytes of codes, scales, tables and branches, without the bias."""
    weight: Callable[[], Tensor]
    """Reads and decodes the weight, float32 of `shape`: what multiplies the rounded input; or, with `build`, the
    weight of the float layer that all of it stands for."""
    activations: ActivationSpec | None = None
    """How the engine's kernel rounds the input; None where it does not."""
    input_scale: Callable[[], Tensor] | None = None
    """Static scales of the input in the `scale_shape` of `activations`, where those are static."""
    build: Callable[[nn.Module], nn.Module] | None = None
    """Makes of the float layer the one that computes as the engine does, where weight and input are not all of it."""


@dataclass(frozen=True)
class Foreign:
    """A file or folder of another engine, opened: its layers can be decoded one by one."""

    format: "ForeignFormat"
    found: Found
    dialect: Mapping[str, str]
    """What tells files apart that look alike, such as {"nibbles": "high first", "block scales": "swizzled"}."""
    layers: Mapping[str, ForeignLayer]
    """By their modules' names in the file."""
    rest: tuple[str, ...]
    """Names of tensors that belong to no quantized layer."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignFormat:
    """A format by its name on the command line."""

    name: str
    title: str
    """What people call it, with the engine."""
    recognises: Callable[[Found], bool]
    """Whether files are in this format, by names, dtypes, shapes, metadata and configuration alone."""
    read: Callable[[Found], Foreign]
    """Open it; UserError for layouts that are mixed up or unknown. Reads no weights."""
    export: Callable[[Source, Path, Progress], Exported] | None = None
    """Write a model there, whole or not at all; UserError naming the layer, the reason and the recipe to use."""
    folder: bool = False
    """Whether an export is a folder instead of a file."""
    suffix: str = ".safetensors"
    """Of an exported file."""
    variants: Sequence[str] = ()
    """What may follow the name and a colon on the command line; `export` takes it as `kind`."""
    weighs_errors: Callable[[Source], bool] | None = None
    """Whether an export of this model weighs errors by calibration data (`Source.importance`); None where none does."""
    refuses: Callable[[nn.Module, WeightSpec, ActivationSpec | None], str | None] | None = None
    """Why the engine cannot take a layer (its shape, its class) in these formats; None where it can."""
    refuses_in: Callable[[nn.Module, str, WeightSpec], str | None] | None = None
    """Why it cannot take the layer of this name of a backbone, whose class and shape it could; None where it can."""
