"""torchao: a diffusers folder that plain diffusers loads where torchao is installed."""

import json
from pathlib import Path

from dmquant.exchange import folder
from dmquant.exchange.formats.torchao.layouts import layout, refuses
from dmquant.exchange.formats.torchao.reading import read, recognises
from dmquant.exchange.interfaces import Exported, ForeignFormat, Progress
from dmquant.exchange.layers import block_format, check, counted, input_notes, unquantized
from dmquant.exchange.source import Source

USAGE = """
import torch  # pip install torchao
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype=torch.bfloat16)
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
    rounded = any(block_format(one.weight_spec) and one.activations is not None for one in source.layers.values())
    notes = input_notes(source, NAME) + ((BLACKWELL,) if rounded else ())
    return Exported(out, counted(source, kinds), exact=True, notes=notes)


NAME = "torchao"
BLACKWELL = "inputs in blocks are multiplied on Blackwell GPUs alone: weights with --a none run on any device"
FORMAT = ForeignFormat(
    NAME, "torchao in diffusers", recognises, lambda found: read(FORMAT, found), export, folder=True, refuses=refuses
)
