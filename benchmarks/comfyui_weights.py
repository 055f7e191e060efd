"""Error of Gaussian weights in comfy-kitchen's W4A8: by its own quantizer, and on the same grid by dmquant.

    PYTHONPATH=FOLDER python benchmarks/comfyui_weights.py

`FOLDER` holds comfy-kitchen (`pip install --no-deps --target FOLDER comfy-kitchen==0.2.40`). NVFP4 of the rotated
weight stands beside them. All take 4.5 bits a weight, without data.
"""

import torch
from comfy_kitchen.backends.eager.w4a8_int8 import dequantize_w4a8_int8_weight, quantize_w4a8_int8_weight
from torch import Tensor

import dmquant
from dmquant.transforms.rotate import regular_hadamard

BLOCK = 256


def main() -> None:
    torch.set_num_threads(1)
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
    rotated = regular_hadamard(weight, BLOCK, 1)

    def error(decoded: Tensor) -> float:
        return ((decoded - rotated).norm() / rotated.norm()).item()

    codes, relative, of_output, _, table = quantize_w4a8_int8_weight(weight)
    theirs = dequantize_w4a8_int8_weight(codes, relative, of_output, table, output_dtype=torch.float32)
    print(f"comfy-kitchen: {error(regular_hadamard(theirs, BLOCK, 1)):.4f}")
    for name in ("lut4_gaussian", "lut4"):
        ours = dmquant.quantize_tensor(rotated, name, "group:16", "mse", "levels")
        print(f"{name}, levels: {error(ours.dequantize()):.4f}")
    print(f"nvfp4, mse: {error(dmquant.quantize_tensor(rotated, 'nvfp4', scale='mse').dequantize()):.4f}")


if __name__ == "__main__":
    main()
