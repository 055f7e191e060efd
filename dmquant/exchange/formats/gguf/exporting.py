"""Writing GGUF: layers as they are where a type of GGUF holds their grid, else quantized again.

Names are those that models were first published with, where they are known, as the readers of such files expect.
Linear layers are quantized, and convolutions go to F16: diffusers multiplies no quantized ones.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmquant import __version__
from dmquant.activations import ActivationSpec
from dmquant.errors import UserError, check_choice
from dmquant.exchange.formats.gguf import blocks
from dmquant.exchange.formats.gguf.blocks import WRITTEN, BlockType
from dmquant.exchange.formats.gguf.header import NUMBERS
from dmquant.exchange.formats.gguf.holding import BLOCK, exactly, holder, holder_of, holds
from dmquant.exchange.formats.gguf.reading import library
from dmquant.exchange.interfaces import Exported, Progress
from dmquant.exchange.keys import Target, targets_of
from dmquant.exchange.layers import HIGH, check_class, described
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import check_room
from dmquant.host.files import replacing
from dmquant.layers import QuantLinear
from dmquant.qtensor import WeightSpec

LONGEST = 127  # characters of a name, which ggml's readers cut
RARE = 1e-3  # of the mean: what an error of a channel costs at least, also where calibration saw nothing
PLAIN = {"F32": (torch.float32, "F32"), "BF16": (torch.bfloat16, "BF16"), "F16": (torch.float16, "F16")}
UNNAMED = "diffusers"


class Tensors(NamedTuple):
    """A tensor of the file: its name, ggml's type, shape and bytes, and how its bytes are made."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], Tensor]


def export(source: Source, out: Path, progress: Progress, kind: str | None = None) -> Exported:
    """Write the backbone as one GGUF file, its layers in the type `kind` or, without one, in what each fits.

    `source.importance` weighs the errors of layers that are quantized again.
    """
    gguf = library("writing GGUF")
    if kind is not None:
        kind = check_choice("type of GGUF", kind.lower(), WRITTEN)
    maker, targets, named = _Maker(source, kind), *targets_of(source)
    tensors = [maker.tensor(target) for target in targets]
    if long := next((one.name for one in tensors if len(one.name) > LONGEST), None):
        raise UserError(f"'{long}' has more than the {LONGEST} characters that a name in a GGUF file may have")
    total, done = sum(one.nbytes for one in tensors), 0
    check_room(out, total)
    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture(source) if named else UNNAMED)
        for key, value in _metadata(source, kind).items():
            writer.add_string(key, value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for one in tensors:
            number = gguf.GGMLQuantizationType(NUMBERS[one.kind])
            writer.add_tensor_info(one.name, one.shape, None, one.nbytes, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for one in tensors:
                writer.write_tensor_data(one.make().numpy())
                progress(done := done + one.nbytes, total)
        finally:
            writer.close()
    weights = [one for one in tensors if one.name.endswith(".weight") and len(one.shape) > 1]
    formats = Counter(one.kind.lower() if one.kind in maker.kinds else HIGH for one in weights)
    exact = not (maker.lost or maker.halved)
    return Exported(out, dict(formats), exact, tuple(_notes(source, maker, named)))


def weighs_errors(source: Source, kind: str | None = None) -> bool:
    """Whether a layer has to be quantized again."""
    maker = _Maker(source, kind)
    layers = (name for name, layer in source.layers.items() if isinstance(layer, QuantLinear))
    return any((chosen := maker.choose(name)) and not holds(chosen, source.layers[name]) for name in layers)


def architecture(source: Source) -> str:
    """`general.architecture` as ComfyUI-GGUF tells models apart."""
    name = type(source.backbone).__name__
    if name == "UNet2DConditionModel":
        return "sdxl" if source.config.get("addition_embed_type") == "text_time" else "sd1"
    return {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}.get(name, UNNAMED)


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why a layer does not go to GGUF as it is."""
    if why := check_class(layer, BLOCK):
        return why
    return None if holder_of(spec) else f"has weights in {described(spec)}, which no type of GGUF holds"


class _Maker:
    """Makes the tensors of a file, one at a time, and remembers what was exact."""

    def __init__(self, source: Source, wanted: str | None):
        self.source, self.wanted = source, wanted
        self.kinds = {one.name for one in WRITTEN.values()}
        self.lost: list[str] = []
        """Layers that were quantized again."""
        self.halved: list[str] = []
        """Weights that F16 rounds."""
        self.activations = any(layer.activations is not None for layer in source.layers.values())

    def tensor(self, target: Target) -> Tensors:
        """What becomes of the sources of `target`: one type for all of its rows."""
        shapes = [self._shape(name) for name in target.sources]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        layers = [name.removesuffix(".weight") for name in target.sources]
        if all(isinstance(self.source.layers.get(layer), QuantLinear) for layer in layers):
            chosen = max((self.choose(layer) for layer in layers), key=lambda one: one.bits if one else math.inf)
            if chosen is not None:
                nbytes = math.prod(shape) // chosen.size * chosen.nbytes
                return Tensors(target.name, chosen.name, shape, nbytes, lambda: self._quantized(target, layers, chosen))
        kind = self._plain_kind(target, shape)
        dtype, _ = PLAIN[kind]
        nbytes = math.prod(shape) * dtype.itemsize
        return Tensors(target.name, kind, shape, nbytes, lambda: self._plain(target, dtype))

    def _shape(self, name: str) -> tuple[int, ...]:
        layer, _, parameter = name.rpartition(".")
        if layer in self.source.layers:
            shape = self.source.layers[layer].weight_shape
            return shape if parameter == "weight" else shape[:1]
        return self.source.header(name).shape

    def choose(self, name: str) -> BlockType | None:
        """The type for a layer: what was asked for, or what holds its grid, or one of no fewer bits; None for none."""
        layer = self.source.layers[name]
        columns, bits = layer.in_features, layer.weight_spec.fmt.bits
        if self.wanted is not None:
            wanted = WRITTEN[self.wanted]
            candidates = [wanted, blocks.Q5_0 if wanted is blocks.Q5_K else blocks.IQ4_NL]
        elif (held := holder(layer)) is not None and held.bits <= max(bits + 2, blocks.Q4_0.bits):
            candidates = [held]
        elif bits < 5:
            candidates = [blocks.Q4_K, blocks.IQ4_NL]
        else:
            candidates = [blocks.Q5_K, blocks.Q5_0] if bits == 5 else [blocks.Q8_0]
        return next((one for one in candidates if columns % one.size == 0), None)

    def _quantized(self, target: Target, layers: Sequence[str], kind: BlockType) -> Tensor:
        return target.rows([self._layer(name, kind) for name in layers])

    def _layer(self, name: str, kind: BlockType) -> Tensor:
        layer = self.source.layer(name)
        data = exactly(layer, kind) if holds(kind, layer) else None
        if data is not None:
            return data
        self.lost.append(name)
        return blocks.quantize(layer.float_weight(), self._cost(name, layer), kind)

    def _cost(self, name: str, layer: QuantLinear) -> Tensor:
        importance = self.source.importance
        known = None if importance is None else importance.mean_squares.get(name)
        if known is None or not known.any():
            return torch.ones(layer.in_features, dtype=torch.float32)
        return known.clamp(min=float(known.mean()) * RARE)

    def _plain_kind(self, target: Target, shape: tuple[int, ...]) -> str:
        """F32 for what has one dimension; 16 bits for the rest, where readers take them."""
        dtypes = {self.source.header(name).dtype for name in target.sources if name in self.source.rest}
        if len(shape) == 1 or "F32" in dtypes:
            return "F32"
        if dtypes == {"BF16"}:
            linear = all(self._is_linear(name) for name in target.sources)
            return "BF16" if linear else "F32"
        return "F16"

    def _is_linear(self, name: str) -> bool:
        module = self.source.backbone.get_submodule(name.rpartition(".")[0])
        return name.endswith(".weight") and isinstance(module, nn.Linear)

    def _plain(self, target: Target, dtype: torch.dtype) -> Tensor:
        rows = target.rows([self._float(name) for name in target.sources])
        made = rows.to(dtype).contiguous()
        if not torch.equal(made.float(), rows):
            self.halved.append(target.name)
        return made.view(torch.uint8) if dtype == torch.bfloat16 else made

    def _float(self, name: str) -> Tensor:
        layer, _, parameter = name.rpartition(".")
        if layer in self.source.layers and parameter == "weight":
            return self.source.layer(layer).float_weight()
        return self.source.tensor(name).float()


def _metadata(source: Source, kind: str | None) -> dict[str, str]:
    known = source.importance
    weighed = "none" if known is None else f"mean squares of the inputs of {known.calls} calls"
    return {
        "general.name": source.folder.resolve().name,
        "dmquant.version": __version__,
        "dmquant.recipe": source.recipe.name,
        "dmquant.type": kind or "by layer",
        "dmquant.importance": weighed,
    }


def _notes(source: Source, maker: _Maker, named: bool) -> Iterator[str]:
    name = type(source.backbone).__name__
    if not named:
        yield f"the original names of a {name} are not known: tensors have diffusers', which ComfyUI may refuse"
    if maker.lost:
        weights = (
            "the error of each input channel weighed by calibration data"
            if maker.source.importance
            else "all errors alike, as there is no calibration data: name a run folder, or --calibration-data"
        )
        yield (
            f"{len(maker.lost)} layers were quantized again, {weights}; dmquant run MODEL --for gguf makes "
            "what GGUF holds as it is"
        )
    if maker.halved:
        yield f"F16 rounds the weights of {len(maker.halved)} layers that are no Linear or have no blocks of 32"
    if maker.activations:
        yield "inputs are not rounded there: images differ from dmquant's, and are nearer to full precision"
