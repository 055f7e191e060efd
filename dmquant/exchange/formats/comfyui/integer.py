"""INT8 and SVDQuant's INT4 as comfy-kitchen stores them (0.2.40, tensor/int8.py, svdquant_w4a4.py)."""

from typing import Any

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.formats.comfyui.computing import Steps
from dmquant.exchange.formats.comfyui.layout import Group, Layout, Opened, decoded, of_engine, split_within
from dmquant.exchange.formats.comfyui.rotated import of_blocks, rotated
from dmquant.exchange.interfaces import ForeignLayer
from dmquant.exchange.tensor_file import Entry
from dmquant.qtensor import WeightSpec
from dmquant.transforms import Storage

FLOATS = "F32", "F16", "BF16"
TILES = "kitchen_tile_packed_w4a4"
"""The layout in which outputs lie in tiles of 128."""


class Int8(Layout):
    """Signed bytes, and a scale for each output or for all."""

    name, transforms = "int8_tensorwise", frozenset({"rotate"})
    spec = WeightSpec.parse("int8", "channel", store="fp32")
    inputs = (of_engine("int8", "token"),)

    def holds(self, spec: WeightSpec) -> bool:
        return spec.fmt == self.spec.fmt and spec.granularity.kind in ("tensor", "channel")

    def misfit(self, shape: tuple[int, int], spec: WeightSpec) -> str | None:
        return split_within(spec, shape[1])

    def entries(self, group: Group) -> list[Entry]:
        rows, _ = group.shape
        return [
            group.entry("weight", torch.int8, group.shape, lambda: group.rows("qweight").view(torch.int8)),
            group.entry("weight_scale", torch.float32, (rows, 1), lambda: group.target.rows(self._scales(group))),
        ]

    def settings(self, group: Group) -> dict[str, Any]:
        size = of_blocks(group.first.transforms)
        return {"convrot": True, "convrot_groupsize": size} if size else {}

    def unfit_transforms(self, transforms: tuple[Storage, ...]) -> str | None:
        other = transforms and not of_blocks(transforms)
        return super().unfit_transforms(transforms) or (
            f"has the transform {transforms[0]}, not ComfyUI's" if other else None
        )

    def _scales(self, group: Group) -> list[Tensor]:
        found = zip(group.layers, group.scales(), strict=True)
        return [scales.expand(layer.weight_shape[0], 1) for layer, scales in found]

    def open(self, layer: Opened) -> ForeignLayer:
        rows, columns = layer.matrix("weight", "I8")
        layer.expect("weight_scale", [(), (1,), (rows,), (rows, 1)], "F32")

        def read() -> Tensor:
            scales = layer.tensor("weight_scale").reshape(-1, 1).expand(rows, 1)
            return decoded(layer.tensor("weight").view(torch.uint8), scales, None, self.spec)

        turned = rotated(layer, columns, read) if layer.settings.get("convrot") else {"weight": read}
        return layer.layer((rows, columns), ("weight", "weight_scale"), activations=self.inputs[0], **turned)


class SvdQuant(Layout):
    """INT4 codes, the first of a byte in its low nibble, scales of 64 inputs, and a branch of low rank beside them.

    The branch takes the input as it comes, before it is divided by the factors of smoothing.
    """

    name, packed, transforms = "svdquant_w4a4", True, frozenset({"lowrank"})
    group_size = 64
    spec = WeightSpec.parse("int4", "group:64", store="bf16")
    exact = WeightSpec.parse("int4", "group:64", store="fp32")
    """As read: scales may be of any floating dtype."""
    inputs = (of_engine("int4", "group:64"),)
    float_product = False

    def holds(self, spec: WeightSpec) -> bool:
        ours = self.spec
        return (spec.fmt, spec.granularity, spec.store) == (ours.fmt, ours.granularity, ours.store)

    def misfit(self, shape: tuple[int, int], spec: WeightSpec) -> str | None:
        if shape[1] % self.group_size:
            return f"has {shape[1]} inputs, no multiple of {self.group_size}"
        return split_within(spec, self.group_size)

    def entries(self, group: Group) -> list[Entry]:
        (rows, columns), bf16 = group.shape, torch.bfloat16
        rank = sum(transform.rank for layer in group.layers for transform in layer.transforms)

        def branches(part: str) -> list[Tensor]:
            return [tensor.view(bf16) for tensor in group.parts(f"lowrank_{part}")]

        def down() -> Tensor:  # branches of fused layers lie beside one another
            return torch.cat(branches("down")).T.contiguous() if rank else torch.empty(columns, 0, dtype=bf16)

        def up() -> Tensor:
            blocks = torch.block_diag(*branches("up")) if rank else torch.empty(rows, 0, dtype=bf16)
            return group.target.in_order(blocks)

        def scales() -> Tensor:
            return group.rows("scale").view(bf16).T.contiguous()

        return [
            group.entry("weight", torch.int8, (rows, columns // 2), lambda: group.rows("qweight").view(torch.int8)),
            group.entry("weight_scale", bf16, (columns // self.group_size, rows), scales),
            group.entry("smooth_factor", bf16, (columns,), lambda: torch.ones(columns, dtype=bf16)),
            group.entry("proj_down", bf16, (columns, rank), down),
            group.entry("proj_up", bf16, (rows, rank), up),
        ]

    def open(self, layer: Opened) -> ForeignLayer:
        if layer.settings.get("act_unsigned"):
            raise UserError(f"{layer.found.path}: layer {layer.name} takes unsigned inputs, which cannot be read here")
        tiled = layer.settings.get("layout") == TILES
        rows, columns = self._tiled_shape(layer) if tiled else self._natural_shape(layer)
        groups = columns // self.group_size
        layer.expect("weight_scale", [(rows // 128, groups, 128) if tiled else (groups, rows)], *FLOATS)
        layer.expect("smooth_factor", [(columns,)], *FLOATS)
        rank = layer.shape("proj_down", *FLOATS)[-1]
        layer.expect("proj_down", [(columns, rank)], *FLOATS)
        layer.expect("proj_up", [(rows // 128, rank, 128) if tiled else (rows, rank)], *FLOATS)

        def by_rows(part: str) -> Tensor:  # of tiles of 128 outputs
            tensor = layer.tensor(part).float()
            return tensor.transpose(1, 2).flatten(0, 1) if tiled else tensor

        def read() -> Tensor:
            codes = layer.tensor("weight").view(torch.uint8)
            if tiled:  # (tiles, groups, 32, 4 outputs of 32 bytes)
                codes = codes.unflatten(3, (4, -1)).permute(0, 2, 3, 1, 4).reshape(rows, columns // 2)
            scales = by_rows("weight_scale") if tiled else layer.tensor("weight_scale").float().T
            return decoded(codes, scales.contiguous(), None, self.exact)

        def weight() -> Tensor:
            branch = by_rows("proj_up") @ layer.tensor("proj_down").float().T
            return read() / layer.tensor("smooth_factor").float() + branch

        def steps(activations: ActivationSpec | None) -> Steps:
            factor = layer.tensor("smooth_factor")
            down = layer.tensor("proj_down").float()
            return Steps(read(), lambda x: x / factor.to(x), activations, down, by_rows("proj_up"))

        parts = "weight", "weight_scale", "smooth_factor", "proj_down", "proj_up"
        return layer.layer((rows, columns), parts, weight, self.inputs[0], steps=steps)

    def _natural_shape(self, layer: Opened) -> tuple[int, int]:
        shape = layer.matrix("weight", "I8")
        if shape[1] * 2 % self.group_size:
            raise layer.unfit("weight", shape)
        return shape[0], 2 * shape[1]

    def _tiled_shape(self, layer: Opened) -> tuple[int, int]:
        shape = layer.shape("weight", "I8")
        if len(shape) != 4 or shape[2:] != (32, 2 * self.group_size) or 0 in shape:
            raise layer.unfit("weight", shape)
        return 128 * shape[0], self.group_size * shape[1]
