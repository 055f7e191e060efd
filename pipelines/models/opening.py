"""Open models for other engines: a folder that dmquant saved, or files that other tools wrote. Reads no weights."""

import functools
import json
from pathlib import Path

from safetensors import safe_open

from dmquant.diffusers.families.generic import COMPONENTS
from dmquant.diffusers.quantizer import QuantConfig, QuantMethod, empty_layers_
from dmquant.errors import UserError
from dmquant.exchange.formats import formats
from dmquant.exchange.formats.gguf import header as gguf
from dmquant.exchange.interfaces import Foreign, Found
from dmquant.exchange.source import Source
from dmquant.host import json_file, weight_file
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.loading import checked_quantized
from dmquant.pipelines.models.skeleton import skeleton
from dmquant.pipelines.models.weights import weight_files


def open_source(folder: Path) -> Source:
    """The backbone of a pipeline folder that dmquant quantized and saved; UserError for anything else."""
    checked_quantized(folder)
    component = next((name for name in COMPONENTS if name in folders.components(folder)), None)
    method = component and folders.quantization(folder, component)
    if method != QuantMethod.DMQUANT.value:
        what = f"was quantized by {method}" if method else "is in full precision"
        raise UserError(f"{folder} {what}: export takes what dmquant quantized (dmquant run, dmquant quantize)")
    part = folder / component
    config = QuantConfig.from_dict(folders.read_json(part / "config.json")["quantization_config"])
    backbone = skeleton(part)
    empty_layers_(backbone, config)
    return Source(backbone, config.recipe, weight_files(part), folder, component)


def find(path: Path) -> Found:
    """The headers and the configuration of a weight file, of a component's folder, or of a pipeline's backbone."""
    if path.is_file() and gguf.is_gguf(path):
        tensors, metadata = gguf.header(path)
        return Found(path, (path,), tensors, metadata, load=functools.partial(gguf.read, path))
    if path.is_dir() and (path / folders.INDEX).is_file():
        path = next((path / name for name in COMPONENTS if (path / name).is_dir()), path)
    files = [path] if not path.is_dir() else weight_files(path) or sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no safetensors files")
    config = path / "config.json"
    tensors, metadata = {}, {}
    for file in files:
        tensors |= weight_file.header(file)
        with safe_open(file, framework="pt") as opened:
            metadata |= opened.metadata() or {}
    content = json_file.read_object(config) if path.is_dir() and config.is_file() else {}
    return Found(path, tuple(files), tensors, metadata, content)


def open_foreign(path: Path) -> Foreign:
    """Open files of another engine, in the format that they are recognised to be in; UserError where there is none."""
    found = find(path)
    matching = [one for one in formats().values() if one.recognises(found)]
    if not matching:
        dtypes = sorted({tensor.dtype for tensor in found.tensors.values()})
        raise UserError(
            f"{path} is in no format that is known here: {len(found.tensors)} tensors of {json.dumps(dtypes)}"
        )
    return matching[0].read(found)
