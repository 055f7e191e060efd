"""compressed-tensors: a folder in the layouts that vLLM and transformers read, by the names of diffusers' models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmquant import __version__
from dmquant.exchange import folder
from dmquant.exchange.formats.compressed_tensors.layouts import Layout, is_exact, layout, refuses
from dmquant.exchange.formats.compressed_tensors.reading import read, recognises
from dmquant.exchange.interfaces import Exported, ForeignFormat, Progress
from dmquant.exchange.layers import block_format, check, counted, high_precision, input_notes, unquantized
from dmquant.exchange.source import Source

NAME = "compressed-tensors"
USAGE = """
# Readers of compressed-tensors load it, such as vLLM-Omni; diffusers itself has no such loader.
"""


def export(source: Source, out: Path, progress: Progress) -> Exported:
    """Write a pipeline folder in such layouts; UserError for a layer that they cannot hold."""
    check(source, NAME, refuses)
    layouts = {name: layout(source, name) for name in source.layers}
    entries = [entry for one in layouts.values() for entry in one.entries] + unquantized(source)
    config = _config(layouts, high_precision(source))
    folder.write(source, out, folder.Folder(NAME, NAME, entries, config, USAGE), progress)
    inexact = [name for name in layouts if not _is_exact(source, name)]
    notes = ("diffusers itself loads no such folder; readers of compressed-tensors such as vLLM-Omni do",)
    if inexact:
        notes += (
            f"{len(inexact)} of {len(layouts)} layers differ by the rounding of a reciprocal, 1e-7 of a weight: "
            "global scales are divided by there",
        )
    kinds = (one.format for one in layouts.values())
    return Exported(out, counted(source, kinds), exact=not inexact, notes=notes + input_notes(source, NAME))


def _is_exact(source: Source, name: str) -> bool:
    if block_format(source.layers[name].weight_spec) != "nvfp4":
        return True
    return is_exact(source.tensor(f"{name}.scale_base").view(torch.float32).reshape(1))


def _config(layouts: Mapping[str, Layout], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config`: a group for each scheme, of linear layers all together or of layers by name."""
    kinds = {}
    for name, one in layouts.items():
        kinds.setdefault(repr((one.format, one.scheme)), (one, []))[1].append(name)
    groups = {
        f"group_{index}": {**one.scheme, "format": one.format, "targets": ["Linear"] if len(kinds) == 1 else names}
        for index, (one, names) in enumerate(kinds.values())
    }
    formats = {one.format for one in layouts.values()}
    return {
        "quant_method": NAME,
        "version": f"dmquant {__version__}",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


FORMAT = ForeignFormat(NAME, NAME, recognises, lambda found: read(FORMAT, found), export, folder=True, refuses=refuses)
