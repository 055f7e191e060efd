"""Open models for other engines: a folder that dmquant saved, or files that other tools wrote. Reads no weights."""

import functools
import json
from pathlib import Path

from safetensors import safe_open
from torch import nn

from dmquant.diffusers import tensors
from dmquant.diffusers.families.generic import COMPONENTS
from dmquant.diffusers.quantizer import QuantConfig, QuantMethod, empty_layers_
from dmquant.diffusers.timesteps import share_timesteps
from dmquant.errors import UserError
from dmquant.exchange.formats import formats
from dmquant.exchange.formats.gguf import header as gguf
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found
from dmquant.exchange.source import Source
from dmquant.host import json_file, weight_file
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.skeleton import skeleton
from dmquant.pipelines.models.weights import weight_files
from dmquant.pipelines.models.whole import AGAIN, check_models


def open_source(folder: Path) -> Source:
    """The backbone of a pipeline folder that dmquant quantized and saved; UserError for anything else."""
    folders.check_whole(folder)
    component = next((name for name in COMPONENTS if name in folders.components(folder)), None)
    method = component and folders.quantization(folder, component)
    if method != QuantMethod.DMQUANT.value:
        what = f"was quantized by {method}" if method else "is in full precision"
        raise UserError(f"{folder} {what}: export takes what dmquant quantized (dmquant run, dmquant quantize)")
    check_models(folder, (component,))
    return _source(folder / component)


def _source(part: Path) -> Source:
    """A component that dmquant saved; UserError where its tensors are not those of the model that its config says."""
    config = QuantConfig.from_dict(folders.read_json(part / "config.json")["quantization_config"])
    backbone = skeleton(part)
    empty_layers_(backbone, config)
    files = weight_files(part)
    if (fault := tensors.misfit(backbone, tensors.of_files(files, str(part)))) is not None:
        raise UserError(f"{part} {fault}: {AGAIN}")
    return Source(backbone, config.recipe, files, part.parent, part.name)


def find(path: Path) -> Found:
    """The headers and the configuration of a weight file, of a component's folder, or of a pipeline's backbone."""
    if path.is_file() and gguf.is_gguf(path):
        held, metadata = gguf.header(path)
        return Found(path, (path,), held, metadata, load=functools.partial(gguf.read, path))
    if path.is_dir() and (path / folders.INDEX).is_file():
        path = next((path / name for name in COMPONENTS if (path / name).is_dir()), path)
    files = [path] if not path.is_dir() else weight_files(path) or sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no safetensors files")
    if len(files) > 1 and not weight_files(path):
        raise UserError(f"{path} holds {len(files)} safetensors files and no index of one model: name one of them")
    config = path / "config.json"
    held, metadata = {}, {}
    for file in files:
        held |= weight_file.header(file)
        with safe_open(file, framework="pt") as opened:
            metadata |= opened.metadata() or {}
    content = json_file.read_object(config) if path.is_dir() and config.is_file() else {}
    return Found(path, tuple(files), held, metadata, content)


def _is_own(found: Found) -> bool:
    config = found.config.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QuantMethod.DMQUANT.value


def _read_own(found: Found) -> Foreign:
    """What dmquant saved, as if it were of another engine."""
    source = _source(found.path)
    layers = {name: _own_layer(source, name, layer) for name, layer in source.layers.items()}
    return Foreign(OWN, found, {}, layers, source.rest)


def _own_layer(source: Source, name: str, layer: nn.Module) -> ForeignLayer:
    parts = [f"{name}.{part}" for part, tensor in layer._parameters.items() if tensor is not None and part != "bias"]

    def build(plain: nn.Module) -> nn.Module:
        built = source.layer(name).to(plain.weight.device, plain.weight.dtype)
        if ranges := share_timesteps(built):
            ranges.set(0.0)  # until the backbone that it becomes a part of tells the timestep
        return built

    return ForeignLayer(
        name,
        layer.weight_spec.fmt.name,
        layer.weight_shape,
        sum(header.end - header.begin for header in map(source.header, parts)),
        lambda: source.layer(name).float_weight(),
        layer.activations,
        build=build,
    )


OWN = ForeignFormat("dmquant", "dmquant's own folder", _is_own, _read_own)


def is_full_precision(found: Found) -> bool:
    """Whether files hold nothing but floating point of 16 bits and more, and whole numbers of 64."""
    return "quantization_config" not in found.config and {each.dtype for each in found.tensors.values()} <= _WIDE


_WIDE = {"F64", "F32", "F16", "BF16", "I64"}


def is_of_others(part: Path) -> bool:
    """Whether the weights of a component are in a format of another engine; UserError for damaged ones."""
    return bool(weight_files(part)) and any(one.recognises(find(part)) for one in formats().values())


def open_foreign(path: Path) -> Foreign:
    """Open quantized files in the format that they are recognised to be in; UserError where there is none."""
    found = find(path)
    matching = [one for one in (OWN, *formats().values()) if one.recognises(found)]
    if not matching and is_full_precision(found):
        raise UserError(f"{path} is in full precision: give what is quantized")
    if not matching:
        dtypes = sorted({tensor.dtype for tensor in found.tensors.values()})
        raise UserError(
            f"{path} is in no format that is known here: {len(found.tensors)} tensors of {json.dumps(dtypes)}"
        )
    return matching[0].read(found)
