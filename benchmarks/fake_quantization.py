"""Rounding activations to FP6: dmquant's compiled and eager loops beside brevitas and microxcaling, on the CPU.

    python benchmarks/fake_quantization.py [--threads N] [--cpu-time]

Variants take turns in one process. Milliseconds are the best of the calls (and the median in brackets), ratios those of
the bests (and the median of the ratios of each turn). The first line says what compiling takes.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from turns import Stopwatch, machine, milliseconds, ratio, table, timed

from dmquant.activations import ActivationSpec
from dmquant.cpu import lookup
from dmquant.kernels import reference


def brevitas_way() -> Callable[[Tensor], Tensor] | str:
    """brevitas' float quantizer with an absmax scale per token, or why there is none."""
    if importlib.util.find_spec("brevitas") is None:
        return "not measured: brevitas is not installed (`pip install brevitas`)"
    from brevitas.core.bit_width import BitWidthConst
    from brevitas.core.function_wrapper import FloatClamp, TensorClamp
    from brevitas.core.quant.float import FloatQuant
    from brevitas.core.utils import StatelessBuffer
    from brevitas.function.ops import compute_max_mantissa as max_mantissa

    class Absmax(nn.Module):
        def forward(self, x: Tensor, largest: Tensor | None) -> Tensor:
            return x.abs().amax(-1, keepdim=True).clamp(min=2.0**-126) / 7.5

    class MaxMantissa(nn.Module):
        def forward(self, bits: Tensor) -> Tensor:
            return max_mantissa(bits)

    quantizer = FloatQuant(
        signed=True,
        exponent_bit_width_impl=BitWidthConst(2),
        mantissa_bit_width_impl=BitWidthConst(3),
        exponent_bias_impl=StatelessBuffer(torch.tensor(1.0)),
        float_clamp_impl=FloatClamp(tensor_clamp_impl=TensorClamp(), signed=True),
        input_view_impl=nn.Identity(),
        compute_max_mantissa=MaxMantissa(),
        scaling_impl=Absmax(),
    )
    return lambda x: quantizer(x.float())[0].to(x.dtype)


def microxcaling_way() -> Callable[[Tensor], Tensor] | str:
    """microxcaling's element rounding with an absmax scale per token, or why there is none."""
    if importlib.util.find_spec("mx") is None:
        return (
            "not measured: microxcaling is not installed "
            "(clone https://github.com/microsoft/microxcaling and put it on PYTHONPATH)"
        )
    from mx.elemwise_ops import _quantize_elemwise

    def way(x: Tensor) -> Tensor:
        tokens = x.float()
        scale = tokens.abs().amax(-1, keepdim=True).clamp(min=2.0**-126) / 7.5
        rounded = _quantize_elemwise(tokens / scale, "fp6_e2m3", round="even", saturate_normals=True)
        return (rounded * scale).to(x.dtype)

    return way


def measure(watch: Stopwatch) -> str:
    """Per-token FP6 E2M3 of a Linear's and of a convolution's input: a markdown table."""
    spec = ActivationSpec.parse("fp6")
    ways = {
        "dmquant, compiled": lambda x: lookup.fake_quantize(x, spec, -1),
        "dmquant, eager": lambda x: reference.fake_quantize(x, spec, -1),
        "brevitas FloatQuant": brevitas_way(),
        "microxcaling": microxcaling_way(),
    }
    inputs = {  # a convolution's pixels, channels last, are tokens: each library gets them as the last dimension
        "1,024 tokens x 1,152": torch.randn(1, 1024, 1152).bfloat16(),
        "conv input 320 x 64 x 64": torch.randn(1, 320, 64, 64).bfloat16().permute(0, 2, 3, 1).contiguous(),
    }
    rows = []
    for input_name, x in inputs.items():
        runnable = {name: (lambda way=way, x=x: way(x)) for name, way in ways.items() if callable(way)}
        expected = reference.fake_quantize(x, spec, -1)
        differing = {name: int((call() != expected).sum()) for name, call in runnable.items()}
        seconds = watch.run(runnable)
        for name, way in ways.items():
            if not callable(way):
                rows.append([input_name, name, way, "", ""])
                continue
            best, median = ratio(seconds, name, "dmquant, compiled")
            agrees = "all equal" if not differing[name] else f"{differing[name]:,} of {x.numel():,} differ"
            rows.append([input_name, name, milliseconds(seconds[name]), f"{best:.1f} ({median:.1f})", agrees])
    return table(["input", "by", "ms", "time / dmquant compiled", "against the reference"], rows)


def compile_seconds() -> float:
    """Of the first large activation: what a process pays once (less, if an earlier one left its code in the cache)."""
    start = time.perf_counter()
    lookup.fake_quantize(torch.randn(1, 1024, 1152).bfloat16(), ActivationSpec.parse("fp6"), -1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    arguments, clock = timed(parser)
    with torch.inference_mode():
        print(machine(arguments), end="\n\n")
        print(f"First large activation: {compile_seconds():.1f} s, compiling included.", end="\n\n")
        print(measure(Stopwatch(arguments.turns, clock)))


if __name__ == "__main__":
    main()
