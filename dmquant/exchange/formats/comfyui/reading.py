"""Open ComfyUI's files: the format of a layer stands in JSON beside it, in the file's header, or in an old marker."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from dmquant.errors import LONGEST, UserError
from dmquant.exchange.formats.comfyui.layout import FLOAT_PRODUCT, Layout, Opened
from dmquant.exchange.formats.comfyui.layouts import LAYOUTS
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found

SETTINGS, OLD, HEADER = "comfy_quant", "scaled_fp8", "_quantization_metadata"
LONGEST_SETTINGS = 10_000  # bytes of a layer's JSON
PREFIXES = "model.diffusion_model.", "diffusion_model."
_OLD_NAMES = {"weight_scale": "scale_weight", "input_scale": "scale_input"}


def recognises(found: Found) -> bool:
    """Whether layers are marked as ComfyUI marks them."""
    return HEADER in found.metadata or any(_last(name) in (SETTINGS, OLD) for name in found.tensors)


def read(found: Found, format: ForeignFormat) -> Foreign:
    """The layers of the file; UserError for one that is not in the format that it is said to be in."""
    old = next((name for name in found.tensors if _last(name) == OLD), None)
    if old is not None:
        found, settings = _as_new(found, old)
    else:
        settings = _of_header(found) | _of_tensors(found)
    layers = {name: _layout(found, name, own).open(Opened(found, name, own)) for name, own in settings.items()}
    rest = tuple(name for name in found.tensors if not _is_part(name, layers))
    return Foreign(format, found, _dialect(layers.values()), layers, rest)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_part(name: str, layers: Mapping[str, ForeignLayer]) -> bool:
    """Whether a tensor belongs to a quantized layer, or marks the file: biases do not."""
    module, _, part = name.rpartition(".")
    return part == OLD or (module in layers and part != "bias")


def _layout(found: Found, name: str, settings: Mapping[str, Any]) -> Layout:
    kind = settings.get("format")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        shown = repr(kind)[:LONGEST]
        raise UserError(f"{found.path}: layer {name} is in the format {shown}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def _of_tensors(found: Found) -> dict[str, Any]:
    """Settings by layer, of the tensors beside the layers."""
    settings = {}
    for name, header in found.tensors.items():
        module, _, part = name.rpartition(".")
        if part != SETTINGS:
            continue
        if header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > LONGEST_SETTINGS:
            raise UserError(f"{found.path}: {name} is no JSON in bytes, but {header.dtype} {list(header.shape)}")
        settings[module] = _parsed(found, name, bytes(found.tensor(name).tolist()))
    return settings


def _of_header(found: Found) -> dict[str, Any]:
    """Settings by layer, of the file's header, whose names may lack what all names of the file begin with."""
    if HEADER not in found.metadata:
        return {}
    layers = _parsed(found, HEADER, found.metadata[HEADER].encode()).get("layers")
    if not isinstance(layers, dict):
        raise UserError(f"{found.path}: {HEADER} of its header lists no layers")
    settings = {}
    for name, own in layers.items():
        likely = (name, *(f"{prefix}{name}" for prefix in PREFIXES))
        module = next((each for each in likely if f"{each}.weight" in found.tensors), name)
        settings[module] = own if isinstance(own, dict) else {"format": own}
    return settings


def _parsed(found: Found, name: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{found.path}: {name} holds no JSON object")
    return content


def _as_new(found: Found, marker: str) -> tuple[Found, dict[str, Any]]:
    """A file of the layout before `comfy_quant`: FP8 all through, as the dtype and size of one tensor tell."""
    header = found.tensors[marker]
    kind = "float8_e5m2" if header.dtype == "F8_E5M2" else "float8_e4m3fn"
    settings = {"format": kind, **({FLOAT_PRODUCT: True} if header.shape == (2,) else {})}
    modules = [name.rpartition(".")[0] for name in found.tensors if _last(name) == _OLD_NAMES["weight_scale"]]
    names = {f"{module}.{old}": f"{module}.{new}" for module in modules for new, old in _OLD_NAMES.items()}
    renamed = {names.get(name, name): tensor for name, tensor in found.tensors.items()}
    back = {new: old for old, new in names.items()}
    same = {each.name: getattr(found, each.name) for each in fields(Found)}
    return Renamed(**same | {"tensors": renamed}, names=back), dict.fromkeys(modules, settings)


@dataclass(frozen=True)
class Renamed(Found):
    """Files some of whose tensors go by other names here."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Names in the files by the names here."""

    def tensor(self, name: str) -> Tensor:
        return super().tensor(self.names.get(name, name))


def _dialect(layers: Iterable[ForeignLayer]) -> dict[str, str]:
    """What another engine's files of the same formats have otherwise."""
    kinds = {layer.format for layer in layers}
    dialect = {}
    if "nvfp4" in kinds:
        dialect |= {"nibbles": "high first", "global scale": "multiplied"}
    if kinds & {"nvfp4", "mxfp8"}:
        dialect["block scales"] = "swizzled"
    return dialect
