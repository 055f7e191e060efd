"""Whether sums of FP8 products are exact here: `torch._scaled_mm` on operands of narrow formats against float64.

    python benchmarks/fp8_sums.py [--device cuda]

Operands are exact in E4M3, and float32 holds their sums: random ones, largest ones, and large before small ones
(`dmquant.gpu.device.worst_operands`), 64 x 64 results of each. Printed: results that are not the exact sum, and the
largest error over the largest sum. Kernel `cuda-fp8` runs formats that integers hold too only where that is 0 without
fast accumulation.
"""

import argparse
import itertools

import torch
from layers import table

from dmquant.formats import get_format
from dmquant.gpu import device, fp8
from dmquant.gpu.operands import E4M3

PAIRS = [("fp6_e2m3", "fp4_e2m1", 0), ("fp6_e2m3", "fp4_e2m1", 2), ("int4", "int4", 2), ("fp6_e3m2", "fp4_e2m1", 0)]
DEPTHS = (1152, 4608)


def errors(inputs: str, weights: str, octaves: int, depth: int, fast: bool, where: torch.device) -> tuple[int, float]:
    """How many results are not exact, and the largest error over the largest sum."""
    a = device.worst_operands(get_format(inputs), E4M3, 0, where, depth)
    b = device.worst_operands(get_format(weights), E4M3, octaves, where, depth)
    exact = a.double() @ b.double().T
    error = (fp8.product(a, b, fast).double() - exact).abs()
    return int((error > 0).sum()), (error.max() / exact.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    where = parser.parse_args().device
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    print(
        f"{name}; torch {torch.__version__}; results that are not exact of {64 * 64:,}, largest error / largest sum\n"
    )
    rows = []
    for (inputs, weights, octaves), depth in itertools.product(PAIRS, DEPTHS):
        row = [f"{inputs} x {weights}, weights times up to {2**octaves}", f"{depth:,}"]
        for fast in (False, True):
            differing, relative = errors(inputs, weights, octaves, depth, fast, where)
            row.append(f"{differing:,} ({relative:.1e})")
        rows.append(row)
    print(table(["operands", "sum of", "use_fast_accum=False", "use_fast_accum=True"], rows))


if __name__ == "__main__":
    main()
