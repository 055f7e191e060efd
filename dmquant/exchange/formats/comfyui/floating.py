"""NVFP4, MXFP8 and FP8 as comfy-kitchen stores them (0.2.40, tensor/nvfp4.py, mxfp8.py, fp8.py)."""

from typing import ClassVar

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.decoding import swapped_nibbles
from dmquant.exchange.formats.comfyui.computing import Steps
from dmquant.exchange.formats.comfyui.layout import (
    Group,
    Layout,
    Opened,
    decoded,
    of_engine,
    split_within,
)
from dmquant.exchange.interfaces import ForeignLayer
from dmquant.exchange.tensor_file import Entry
from dmquant.gpu.blocked import from_blocked, in_tiles, to_blocked
from dmquant.qtensor import WeightSpec


class Blocks(Layout):
    """A scale for each block of consecutive inputs, in the order of the tensor cores."""

    spec: ClassVar[WeightSpec]
    """Of weights, and of inputs."""

    @property
    def block(self) -> int:
        return self.spec.granularity.size

    def holds(self, spec: WeightSpec) -> bool:
        ours = self.spec
        return (spec.fmt, spec.granularity, spec.store) == (ours.fmt, ours.granularity, ours.store)

    def misfit(self, shape: tuple[int, int], spec: WeightSpec) -> str | None:
        if shape[1] % self.block:
            return f"has {shape[1]} inputs, no multiple of {self.block}"
        return split_within(spec, self.block)

    def scales(self, group: Group, dtype: torch.dtype) -> Entry:
        """The entry of the blocks' scales."""
        rows, columns = group.shape
        shape = in_tiles(rows, columns // self.block)
        return group.entry(
            "weight_scale", dtype, shape, lambda: to_blocked(group.rows("scale")).view(dtype).view(shape)
        )

    def opened_scales(self, layer: Opened, rows: int, columns: int, dtype: str) -> None:
        """Check the shape of the blocks' scales for a weight (rows, columns)."""
        layer.expect("weight_scale", [in_tiles(rows, columns // self.block)], dtype, "U8")

    def read_scales(self, layer: Opened, rows: int, columns: int) -> Tensor:
        """The blocks' scales as dmquant stores them, uint8 (rows, blocks)."""
        bytes_ = layer.tensor("weight_scale").contiguous().view(torch.uint8).flatten()
        return from_blocked(bytes_, rows, columns // self.block).contiguous()


class Nvfp4(Blocks):
    """E2M1 codes, the first of a byte in its high nibble; E4M3 scales of 16 relative to one number."""

    name, packed, transforms = "nvfp4", True, frozenset({"smooth"})
    spec = WeightSpec.parse("nvfp4")
    inputs = (of_engine("nvfp4"), of_engine("nvfp4", scale="static:1"))

    def entries(self, group: Group) -> list[Entry]:
        rows, columns = group.shape
        base = group.shared("scale_base", "scales of the whole tensor")
        entries = [
            group.entry("weight", torch.uint8, (rows, columns // 2), lambda: swapped_nibbles(group.rows("qweight"))),
            self.scales(group, torch.float8_e4m3fn),
            group.scalar("weight_scale_2", base),
            *group.static_scale(),
        ]
        if group.first.transforms:
            group.shared("smooth_factor", "factors of smoothing")
            factor = f"{group.names[0]}.smooth_factor"
            entries.append(
                group.entry(
                    "pre_quant_scale",
                    torch.bfloat16,
                    (columns,),
                    lambda: group.source.tensor(factor).view(torch.bfloat16).flatten(),
                )
            )
        return entries

    def open(self, layer: Opened) -> ForeignLayer:
        rows, half = layer.matrix("weight", "U8")
        columns = 2 * half
        if columns % self.block:
            raise layer.unfit("weight", (rows, half))
        self.opened_scales(layer, rows, columns, "F8_E4M3")
        layer.expect("weight_scale_2", [(), (1,)], "F32")

        def read() -> Tensor:
            codes, base = swapped_nibbles(layer.tensor("weight")), layer.tensor("weight_scale_2").view(1, 1)
            return decoded(codes, self.read_scales(layer, rows, columns), base, self.spec)

        def read_smoothed() -> Tensor:
            return read() * layer.tensor("pre_quant_scale").float()

        def steps(activations: ActivationSpec | None) -> Steps:
            factor = layer.tensor("pre_quant_scale")
            return Steps(read(), lambda x: x * factor.to(x), activations)

        static, smoothed = layer.scalar("input_scale"), layer.has("pre_quant_scale")
        if smoothed:
            layer.expect("pre_quant_scale", [(columns,)], "F32", "F16", "BF16")
        parts = "weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"
        weight = read_smoothed if smoothed else read
        activations = self.inputs[static is not None]
        return layer.layer((rows, columns), parts, weight, activations, static, steps if smoothed else None)


class Mxfp8(Blocks):
    """E4M3 codes, and power-of-two scales of 32."""

    name = "mxfp8"
    spec = WeightSpec.parse("mxfp8")
    inputs = (of_engine("mxfp8"),)

    def entries(self, group: Group) -> list[Entry]:
        shape, dtype = group.shape, torch.float8_e4m3fn
        codes = group.entry("weight", dtype, shape, lambda: group.rows("qweight").view(dtype))
        return [codes, self.scales(group, torch.uint8)]

    def open(self, layer: Opened) -> ForeignLayer:
        rows, columns = layer.matrix("weight", "F8_E4M3")
        if columns % self.block:
            raise layer.unfit("weight", (rows, columns))
        self.opened_scales(layer, rows, columns, "F8_E8M0")

        def read() -> Tensor:
            codes = layer.tensor("weight").view(torch.uint8)
            return decoded(codes, self.read_scales(layer, rows, columns), None, self.spec)

        return layer.layer((rows, columns), ("weight", "weight_scale"), read, self.inputs[0])


class Float8(Layout):
    """FP8 codes and one scale of the whole tensor."""

    def __init__(self, name: str, fmt: str, dtype: torch.dtype):
        self.name, self.dtype = name, dtype
        self.spec = WeightSpec.parse(fmt, "tensor", store="fp32")
        known = fmt == "fp8_e4m3"  # of E5M2 with E5M2 no kernel has products: kitchen decodes both
        of_input = of_engine if known else ActivationSpec.parse
        self.inputs = (of_input(fmt, "tensor", scale="static:1"),)

    def holds(self, spec: WeightSpec) -> bool:
        return spec.fmt == self.spec.fmt and spec.granularity == self.spec.granularity

    def misfit(self, shape: tuple[int, int], spec: WeightSpec) -> str | None:
        return split_within(spec, shape[1])

    def entries(self, group: Group) -> list[Entry]:
        group.shared("scale", "scales of the whole tensor")
        if group.first.scale_base is not None:
            group.shared("scale_base", "scales of the whole tensor")
        scale = group.scales()[0]
        codes = group.entry("weight", self.dtype, group.shape, lambda: group.rows("qweight").view(self.dtype))
        return [codes, group.scalar("weight_scale", scale), *group.static_scale()]

    def open(self, layer: Opened) -> ForeignLayer:
        shape = layer.matrix("weight", {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[self.dtype])
        layer.expect("weight_scale", [(), (1,)], "F32")

        def read() -> Tensor:
            scale = layer.tensor("weight_scale").view(1, 1)
            return decoded(layer.tensor("weight").view(torch.uint8), scale, None, self.spec)

        # ComfyUI's scale where the file has none
        static = layer.scalar("input_scale") or (lambda: torch.ones((), dtype=torch.float32))
        return layer.layer(shape, ("weight", "weight_scale", "input_scale"), read, self.inputs[0], static)
