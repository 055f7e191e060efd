"""Whether the tensors of files are those of a model: names, shapes and kinds, before a weight is read."""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.host import weight_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Dtypes that models are saved in, by their names in safetensors."""
UNUSED = re.compile(
    r"(^|\.)position_ids$|rotary_emb\.inv_freq$"  # buffers that were saved once and are computed today
    r"|^caption_projection\.y_embedding$"  # PixArt-alpha: what training gave for captions that it dropped
)
"""Names of tensors that published files hold and no model needs."""
PACKED = ".qweight"


def of_files(paths: Iterable, where: str) -> dict[str, Tensor]:
    """Tensors on the meta device, by name, like those of safetensors files; UserError for a dtype that no model has."""
    found = {name: tensor for path in paths for name, tensor in weight_file.header(path).items()}
    strange = [name for name, tensor in found.items() if tensor.dtype not in DTYPES]
    if strange:
        dtype = found[strange[0]].dtype
        raise UserError(f"{where} holds '{strange[0]}' in {dtype}, which no model is loaded from: get the model again")
    return {name: torch.empty(each.shape, dtype=DTYPES[each.dtype], device="meta") for name, each in found.items()}


def of_repeated_layers(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `found` that are the model's, packed, or of one more of its repeated layers.

    A single-file checkpoint holds other things, too, and what converts it may leave some of them.
    """
    known = {re.sub(r"\d+", "#", name) for name in model.state_dict()}
    return {name: each for name, each in found.items() if name.endswith(PACKED) or re.sub(r"\d+", "#", name) in known}


def misfit(model: nn.Module, found: Mapping[str, Tensor]) -> str | None:
    """What is wrong with tensors that are to be loaded into a diffusers model; None if nothing is."""
    expected = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    ignored = [UNUSED, *map(re.compile, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unused = found.keys() - expected.keys() - buffers
    extra = {name for name in unused if not any(pattern.search(name) for pattern in ignored)}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    misshapen = {
        name: (tuple(found[name].shape), shape)
        for name, shape in shapes.items()
        if name in found and tuple(found[name].shape) != shape
    }
    return described(expected.keys() - found.keys(), extra, misshapen) or wrong_kind(expected, found)


def described(
    missing: Collection[str], extra: Collection[str], misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> str | None:
    """The first of the faults in words that follow the name of a folder; shapes are the file's and the model's."""
    packed = [[name for name in names if name.endswith(PACKED)] for names in (missing, extra)]
    if packed[1]:
        return f"holds packed weights ('{min(packed[1])}') that its config.json does not describe"
    if packed[0]:
        return f"is quantized by its config.json, but holds no packed weight '{min(packed[0])}'"
    if extra:
        return f"holds {len(extra)} tensor(s) that its config.json has no place for, '{min(extra)}' among them"
    if missing:
        return f"lacks {len(missing)} tensor(s) of its model, '{min(missing)}' among them"
    if misshapen:
        name = min(misshapen)
        stored, expected = misshapen[name]
        return f"holds '{name}' in shape {list(stored)}, which its config.json says is {list(expected)}"
    return None


def wrong_kind(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first tensor whose dtype cannot be what was saved: floats may be of any width, packed bytes of one dtype."""
    for name in sorted(expected.keys() & found.keys()):
        wanted, stored = expected[name].dtype, found[name].dtype
        if stored != wanted and not (wanted.is_floating_point and stored.is_floating_point):
            return f"holds '{name}' in {stored}, which is saved in {wanted}".replace("torch.", "")
    return None
