"""Weights that comfy-kitchen stores rotated: INT8 with `convrot`, and 4-bit indices of integers.

Its 0.2.40 has them in tensor/int8.py and w4a8_int8.py. The input is rotated before it is rounded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.formats.comfyui.computing import Steps
from dmquant.exchange.formats.comfyui.layout import Group, Layout, Opened, of_engine, split_within
from dmquant.exchange.interfaces import ForeignLayer
from dmquant.exchange.levels import levels_of
from dmquant.exchange.tensor_file import Entry
from dmquant.formats import LookupFormat
from dmquant.grids.table import look_up
from dmquant.packing import unpack
from dmquant.qtensor import WeightSpec
from dmquant.stores import LEVELS
from dmquant.transforms import Storage
from dmquant.transforms.rotate import Rotate, regular_hadamard

BLOCK, GROUP = 256, 16  # of the rotation, and of inputs that share a scale, unless the file says otherwise
E4M3 = torch.float8_e4m3fn


def of_blocks(transforms: tuple[Storage, ...]) -> int | None:
    """Inputs of a block of the rotation; None without one, and for one that is not ComfyUI's."""
    rotation = next((one for one in transforms if isinstance(one, Rotate)), None)
    if rotation is None or rotation.options.order != "regular" or rotation.size < 4:
        return None
    return rotation.size


def rotated(layer: Opened, columns: int, weight: Callable[[], Tensor]) -> dict[str, Any]:
    """The rotation of a layer that is read, whose weight is stored so: what `Opened.layer` takes."""
    size = layer.option("convrot_groupsize", BLOCK)
    if columns % size or size & (size - 1) or size.bit_length() % 2 == 0 or size < 4:
        raise UserError(f"{layer.found.path}: layer {layer.name} has blocks of {size} rotated inputs, of {columns}")

    def turn(x: Tensor) -> Tensor:
        return regular_hadamard(x.float(), size, -1).to(x.dtype)

    def steps(activations: ActivationSpec | None) -> Steps:
        return Steps(weight(), turn, activations)

    return {"weight": lambda: turn(weight()), "steps": steps}


class Levels(Layout):
    """Indices into 16 values, the first of a byte in its low nibble, which times a group's scale, rounded, are INT8."""

    name, packed, transforms = "asym_w4a8_int8", True, frozenset({"rotate"})
    inputs = (of_engine("int8", "token"),)

    def holds(self, spec: WeightSpec) -> bool:
        return (
            spec.store == LEVELS and isinstance(spec.fmt, LookupFormat) and spec.granularity.size in (4, 8, 16, 32, 64)
        )

    def misfit(self, shape: tuple[int, int], spec: WeightSpec) -> str | None:
        if shape[1] % GROUP:
            return f"has {shape[1]} inputs, no multiple of {GROUP}"
        return split_within(spec, spec.granularity.size)

    def unfit_transforms(self, transforms: tuple[Storage, ...]) -> str | None:
        found = super().unfit_transforms(transforms)
        return found or (None if of_blocks(transforms) else f"lacks the rotation that {self.name} has (order: regular)")

    def settings(self, group: Group) -> dict[str, Any]:
        size = group.first.weight_spec.granularity.size
        return {"group_size": size, "convrot_groupsize": of_blocks(group.first.transforms)}

    def entries(self, group: Group) -> list[Entry]:
        rows, columns = group.shape
        spec = group.first.weight_spec
        groups = rows, columns // spec.granularity.size
        return [
            group.entry("weight", torch.int8, (rows, columns // 2), lambda: group.rows("qweight").view(torch.int8)),
            group.entry("weight_s_rel", E4M3, groups, lambda: group.rows("scale").view(E4M3)),
            group.entry(
                "weight_s_channel",
                torch.float32,
                (rows,),
                lambda: group.rows("scale_base").view(torch.float32).flatten(),
            ),
            group.entry("weight_codebook", torch.float32, (16,), lambda: spec.fmt.values),
        ]

    def open(self, layer: Opened) -> ForeignLayer:
        rows, width = layer.matrix("weight", "I8")
        columns, size = 2 * width, layer.option("group_size", GROUP)
        if columns % size or layer.has("weight_correction"):
            raise layer.unfit("weight", (rows, width))
        layer.expect("weight_s_rel", [(rows, columns // size)], "F8_E4M3", "U8", "F32")
        layer.expect("weight_s_channel", [(rows,)], "F32")
        if layer.has("weight_codebook"):
            layer.expect("weight_codebook", [(16,)], "F32")

        def read() -> Tensor:
            relative = layer.tensor("weight_s_rel")
            relative = (relative.view(E4M3) if relative.itemsize == 1 else relative).float()
            integers = torch.arange(-8, 8, dtype=torch.float32)
            values = layer.tensor("weight_codebook") if layer.has("weight_codebook") else integers
            tables = levels_of(torch.cat([relative, layer.tensor("weight_s_channel")[:, None]], 1), values)
            indices = unpack(layer.tensor("weight").view(torch.uint8), 4, columns)
            return look_up(indices.view(len(tables), -1), tables).view(rows, columns)

        parts = "weight", "weight_s_rel", "weight_s_channel", "weight_codebook"
        return layer.layer((rows, columns), parts, activations=self.inputs[0], **rotated(layer, columns, read))
