"""Images of a ComfyUI file without dmquant: plain diffusers, and comfy-kitchen for the quantized layers.

    PYTHONPATH=FOLDER_OF_COMFY_KITCHEN python benchmarks/comfyui_loader.py FILE PIPELINE IMAGES CALL PROMPT...

`PIPELINE` is the folder of the full-precision pipeline, `CALL` its arguments beside the prompt in JSON. Linear layers
are loaded and run as ComfyUI's comfy/ops.py does it (`_load_quantized_module`, `mixed_precision_ops.Linear.forward`),
on the CPU. `IMAGES` becomes a file of PyTorch with the images of all prompts, float32 (n, height, width, 3).
benchmarks/comfyui_images.py calls it.

Products are float32, of what comfy-kitchen decodes and rounds; with PRODUCTS=kernel its own, of 8-bit integers.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

operators = torch.library.Library("torchvision", "FRAGMENT")  # PyPI's torchvision lacks them beside a CPU torch
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from comfy_kitchen import tensor as kitchen
from comfy_kitchen.backends.eager.quantization import quantize_int8_rowwise
from comfy_kitchen.backends.eager.w4a8_int8 import _dequant_int4_grouped_to_int8
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.int8_utils import _build_hadamard, _rotate_activation
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file

LAYOUTS = {  # layout class, its parameters by the tensors of the file, and the dtypes that these are viewed in
    "float8_e4m3fn": ("TensorCoreFP8Layout", {"scale": "weight_scale"}, {}),
    "nvfp4": (
        "TensorCoreNVFP4Layout",
        {"scale": "weight_scale_2", "block_scale": "weight_scale"},
        {"weight_scale": torch.float8_e4m3fn},
    ),
    "mxfp8": ("TensorCoreMXFP8Layout", {"scale": "weight_scale"}, {"weight_scale": torch.float8_e8m0fnu}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {"scale": "weight_scale"}, {}),
    "asym_w4a8_int8": (
        "AsymW4A8Int8Layout",
        {"scale": "weight_s_rel", "s_channel": "weight_s_channel", "codebook": "weight_codebook"},
        {},
    ),
    "svdquant_w4a4": (
        "TensorCoreSVDQuantW4A4Layout",
        {"scale": "weight_scale", "proj_down": "proj_down", "proj_up": "proj_up", "smooth_factor": "smooth_factor"},
        {},
    ),
}
IN_KERNEL = {"int8_tensorwise", "asym_w4a8_int8", "svdquant_w4a4"}  # whose kernels round the input themselves
PRODUCTS = os.environ.get("PRODUCTS", "float32")  # of what those round; or `kernel`, whose sums are of whole numbers
OPTIONS = {"convrot", "convrot_groupsize", "group_size"}


class Linear(nn.Module):
    """A quantized layer as ComfyUI runs it."""

    def __init__(self, layer: nn.Linear, parts: dict[str, Tensor], settings: dict):
        super().__init__()
        self.format, self.full = settings["format"], settings.get("full_precision_matrix_mult", False)
        self.layout, names, dtypes = LAYOUTS[self.format]
        views = {name: parts[name].view(dtypes[name]) if name in dtypes else parts[name] for name in names.values()}
        params = getattr(kitchen, self.layout).Params(
            **{each: views[name] for each, name in names.items()},
            **{option: settings[option] for option in OPTIONS & settings.keys()},
            orig_dtype=layer.weight.dtype,
            orig_shape=tuple(layer.weight.shape),
        )
        self.quantized = QuantizedTensor(parts["weight"], self.layout, params)
        self.options = settings
        self.bias, self.input_scale, self.factor = layer.bias, parts.get("input_scale"), parts.get("pre_quant_scale")

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.factor is None else x * self.factor.to(x.dtype)
        if self.full:
            return F.linear(x, self.quantized.dequantize(), self.bias)
        if self.format == "svdquant_w4a4":  # its eager functions take 16 bits alone
            bias = None if self.bias is None else self.bias.bfloat16()
            return F.linear(x.bfloat16(), self.quantized, bias).to(x.dtype)
        if self.format in IN_KERNEL and PRODUCTS == "float32":
            return F.linear(self.rounded(x), self.stored(), self.bias)
        if self.format in IN_KERNEL:
            return F.linear(x, self.quantized, self.bias)
        scale = self.input_scale
        if self.format == "float8_e4m3fn" and scale is None:
            scale = 1.0
        rounded = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), self.layout, scale=scale)
        return F.linear(rounded.dequantize(), self.quantized.dequantize(), self.bias).view(*x.shape[:-1], -1)

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the kernel of 8-bit integers rotates and rounds it."""
        if self.options.get("convrot", self.format == "asym_w4a8_int8"):
            size = self.options["convrot_groupsize"]
            x = _rotate_activation(x, _build_hadamard(size, dtype=x.dtype), size)
        codes, scales = quantize_int8_rowwise(x)
        return codes.to(x.dtype) * scales

    def stored(self) -> Tensor:
        """The weight as it multiplies that input."""
        params, codes = self.quantized._params, self.quantized._qdata
        if self.format == "int8_tensorwise":
            return codes.float() * params.scale
        levels = _dequant_int4_grouped_to_int8(codes, params.scale, params.codebook, params.group_size)
        return levels.float() * params.s_channel[:, None]


def by_diffusers_names(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The file's tensors by diffusers' names: diffusers' own converter gives them where they are the original's."""
    if not any(name.startswith("model.diffusion_model.") for name in state):
        return state
    return convert_ldm_unet_checkpoint(checkpoint=state, config=backbone.config)


def main(file: str, folder: str, images: str, call: str, *prompts: str) -> None:
    assert "dmquant" not in sys.modules
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    backbone = getattr(pipeline, "unet", None) or pipeline.transformer
    state = by_diffusers_names(load_file(file), backbone)
    quantized = sorted(name.removesuffix(".comfy_quant") for name in state if name.endswith(".comfy_quant"))
    for name in quantized:
        parts = {
            part: state.pop(key)
            for key in list(state)
            if key.rpartition(".")[0] == name and (part := key.rpartition(".")[2]) != "bias"
        }
        settings = json.loads(parts.pop("comfy_quant").numpy().tobytes())
        layer = backbone.get_submodule(name)
        if layer.bias is not None:
            layer.bias.data = state.pop(f"{name}.bias").to(layer.bias.dtype)
        parent, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(parent), last, Linear(layer, parts, settings))
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.rpartition(".")[0] in quantized for name in missing)
    made = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(index)
        made.append(pipeline(prompt, generator=generator, output_type="np", **json.loads(call)).images)
    torch.save(torch.cat([torch.from_numpy(image) for image in made]), images)
    assert "dmquant" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
