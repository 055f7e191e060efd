"""Weight error by format and store of scales, of the embedded backbones: a markdown table.

    python benchmarks/scale_stores.py [--granularity group:16] [--models emoji-pixart,emoji-sd]

The mean over all matrices of at least 4,096 weights of the squared error over the square; scales by the rule mse.
"""

import argparse
from statistics import fmean

from torch import Tensor

from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.runs.settings import Options, resolve
from dmquant.qtensor import quantize_tensor

FORMATS = ("fp4_e2m1", "fp4_e1m2", "int4", "int3")
STORES = ("bf16", "e4m3", "int", "pow2:2", "pow2")
SMALLEST = 4096  # weights of a matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--granularity", default="group:16")
    parser.add_argument("--models", default="emoji-pixart,emoji-sd", help="with commas")
    options = parser.parse_args()
    weights = []
    for model in options.models.split(","):
        settings = resolve(Options(model=model, recipe="rtn64", device="cpu"))
        pipeline = load_full_precision(settings.model, settings.dtype, settings.device)
        backbone = getattr(pipeline, settings.family.component).requires_grad_(False)
        weights += [one.float() for one in backbone.parameters() if one.ndim > 1 and one.numel() >= SMALLEST]
    print(f"| format | {' | '.join(f'`{store}`' for store in STORES)} |\n|{' --- |' * (len(STORES) + 1)}")
    for format in FORMATS:
        lost = (fmean(_lost(weight, format, options.granularity, store) for weight in weights) for store in STORES)
        print(f"| `{format}` | {' | '.join(f'{one:.5f}' for one in lost)} |", flush=True)


def _lost(weight: Tensor, format: str, granularity: str, store: str) -> float:
    quantized = quantize_tensor(weight, format, granularity, "mse", store).dequantize()
    return float((quantized - weight).square().sum() / weight.square().sum())


if __name__ == "__main__":
    main()
