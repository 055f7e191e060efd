"""torchao: a diffusers folder that plain diffusers loads where torchao is installed."""

import json
from pathlib import Path

from dmquant.exchange import folder
from dmquant.exchange.formats.torchao.layouts import layout, refuses
from dmquant.exchange.formats.torchao.reading import read, recognises
from dmquant.exchange.interfaces import Exported, ForeignFormat, Progress
from dmquant.exchange.layers import check, counted, input_notes, unquantized
from dmquant.exchange.source import Source

USAGE = """
import torch  # pip install torchao
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", torch_dtype=torch.bfloat16)
"""


def export(source: Source, out: Path, progress: Progress) -> Exported:
    """Write a pipeline folder whose backbone has torchao's tensors; UserError for a layer that they cannot hold."""
    check(source, NAME, refuses)
    layouts = {name: layout(source, name) for name in source.layers}
    plain = unquantized(source)
    tensors = {f"{name}.weight": one.header() for name, one in layouts.items()}
    tensors |= {entry.name: {"_type": "Tensor"} for entry in plain}
    metadata = {name: json.dumps(header) for name, header in tensors.items()}
    metadata["tensor_names"] = json.dumps(list(tensors))
    kinds = [one.kind for one in layouts.values()]
    usual = next((one.config for one in layouts.values() if one.kind == max(kinds, key=kinds.count)), None)
    entries = [entry for name, one in layouts.items() for entry in one.entries(name)] + plain
    config = {"quant_method": "torchao", "quant_type": {"default": usual}, "modules_to_not_convert": None}
    target = folder.Folder(NAME, "torchao", entries, config, USAGE, metadata)
    folder.write(source, out, target, progress)
    return Exported(out, counted(source, kinds), exact=True, notes=input_notes(source, NAME))


NAME = "torchao"
FORMAT = ForeignFormat(
    NAME, "torchao in diffusers", recognises, lambda found: read(FORMAT, found), export, folder=True, refuses=refuses
)
