"""Speed and memory of quantized layers against bf16, and of fake quantization against other libraries, on the CPU.

    python benchmarks/layers.py [--quick] [--threads N] [--cpu-time] [--out results.json]

Prints markdown tables. Variants of a row take turns in one process (A, B, C, A, B, C, ...), so that whatever else the
machine does hits all of them. Times are the best of N calls (and the median in brackets); ratios are those of the bests
(and the median of the ratios of each turn). Compilation happens before timing and is reported apart. `--cpu-time`
counts processor time instead of wall time, for a busy machine; it needs `--threads 1`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.cpu import lookup
from dmquant.kernels import reference
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec

RECIPES = {"W4A16": ("fp4", None), "W4A6": ("fp4", "fp6"), "W8A8": ("fp8", "fp8")}
LIMITS = {"W4A16": 1.3, "W4A6": 1.6}  # of bf16's time, from 1,024 tokens or pixels on
LIMITED_FROM = 1024

LINEARS = [  # name, in, out, tokens
    ("PixArt attention", 1152, 1152, 1024),
    ("PixArt ff.net.0", 1152, 4608, 1024),
    ("PixArt ff.net.2", 4608, 1152, 1024),
    ("PixArt attention", 1152, 1152, 4096),
    ("SD 1.5 attention", 320, 320, 1024),
    ("SD 1.5 attention", 1280, 1280, 1024),
    ("SD 1.5 GEGLU", 320, 2560, 1024),
]
CONVOLUTIONS = [(320, 320, 64), (640, 640, 32), (1280, 1280, 16), (2560, 1280, 16)]  # in, out, height and width
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Stopwatch:
    """Calls variants in turns and keeps their seconds."""

    def __init__(self, turns: int, clock: Callable[[], float]):
        self.turns, self.clock = turns, clock

    def run(self, variants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        seconds = {name: [] for name in variants}
        for call in variants.values():
            call()
        for _ in range(self.turns):
            for name, call in variants.items():
                start = self.clock()
                call()
                seconds[name].append(self.clock() - start)
        return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """Of the bests, and the median over turns."""
    turns = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    return min(seconds[name]) / min(seconds[base]), statistics.median(turns)


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * min(seconds):.2f} ({1e3 * statistics.median(seconds):.2f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"


def measure_layer(layer: nn.Module, x: Tensor, watch: Stopwatch) -> dict:
    """Seconds of bf16 and of every recipe, bytes at rest, and the bytes of the weight while a call runs."""
    quantized = {
        name: quantize_layer(layer, WeightSpec.parse(weights), ActivationSpec.parse(inputs) if inputs else None)
        for name, (weights, inputs) in RECIPES.items()
    }
    seconds = watch.run({"bf16": lambda: layer(x)} | {name: (lambda m=m: m(x)) for name, m in quantized.items()})
    return {
        "tokens": x.numel() // (layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features),
        "seconds": seconds,
        "ratios": {name: ratio(seconds, name, "bf16") for name in RECIPES},
        "bytes": {"bf16": layer.weight.nbytes}
        | {name: m.qweight.nbytes + m.scale.nbytes for name, m in quantized.items()},
        "temporary": quantized["W4A6"].dequantize(x.dtype).nbytes,
    }


def measure_layers(quick: bool, watch: Stopwatch) -> dict[str, dict]:
    results = {}
    for name, columns, rows, tokens in LINEARS[:2] if quick else LINEARS:
        layer, x = nn.Linear(columns, rows).bfloat16(), torch.randn(1, tokens, columns).bfloat16()
        results[f"{name} {columns}→{rows}, {tokens:,} tokens"] = measure_layer(layer, x, watch)
    for columns, rows, size in CONVOLUTIONS[:1] if quick else CONVOLUTIONS:
        for format_name, memory_format in FORMATS.items():
            layer = nn.Conv2d(columns, rows, 3, padding=1).bfloat16().to(memory_format=memory_format)
            x = torch.randn(1, columns, size, size).bfloat16().to(memory_format=memory_format)
            name = f"SD 1.5 conv {columns}→{rows} 3x3 at {size}x{size}, {format_name}"
            results[name] = measure_layer(layer, x, watch)
    return results


def layers_table(results: dict[str, dict]) -> str:
    rows = [
        [name, milliseconds(result["seconds"]["bf16"])]
        + [f"{best:.2f} ({median:.2f})" for best, median in result["ratios"].values()]
        for name, result in results.items()
    ]
    return table(["layer", "bf16 ms", *(f"{name} / bf16" for name in RECIPES)], rows)


def memory_table(results: dict[str, dict]) -> str:
    weights = {name.split(",")[0]: result for name, result in results.items()}
    rows = [
        [name]
        + [mebibytes(result["bytes"][kind]) for kind in ("bf16", "W4A6", "W8A8")]
        + [f"{result['bytes']['bf16'] / result['bytes']['W4A6']:.2f}", mebibytes(result["temporary"])]
        for name, result in weights.items()
    ]
    return table(["weight", "bf16 MiB", "FP4 MiB", "FP8 MiB", "bf16 / FP4", "dequantized during a call, MiB"], rows)


def targets(results: dict[str, dict]) -> list[str]:
    """One line for every layer over its limit, of those with enough tokens or pixels to be held to one."""
    judged = {name: result for name, result in results.items() if result["tokens"] >= LIMITED_FROM}
    return [
        f"{name}: {recipe} is {result['ratios'][recipe][0]:.2f} of bf16's time, the target is {limit}"
        for name, result in judged.items()
        for recipe, limit in LIMITS.items()
        if result["ratios"][recipe][0] > limit
    ]


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


def measure_fake_quantization(watch: Stopwatch) -> tuple[str, dict]:
    """Per-token FP6 E2M3 of a Linear's and of a convolution's input: a markdown table and the same as data."""
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
    rows, data = [], {}
    for input_name, x in inputs.items():
        runnable = {name: (lambda way=way, x=x: way(x)) for name, way in ways.items() if callable(way)}
        expected = reference.fake_quantize(x, spec, -1)
        differing = {name: int((call() != expected).sum()) for name, call in runnable.items()}
        seconds = watch.run(runnable)
        data[input_name] = {"seconds": seconds, "differing": differing}
        for name, way in ways.items():
            if not callable(way):
                rows.append([input_name, name, way, "", ""])
                continue
            best, median = ratio(seconds, name, "dmquant, compiled")
            agrees = "all equal" if not differing[name] else f"{differing[name]:,} of {x.numel():,} differ"
            rows.append([input_name, name, milliseconds(seconds[name]), f"{best:.1f} ({median:.1f})", agrees])
    return table(["input", "by", "ms", "time / dmquant compiled", "against the reference"], rows), data


def compile_seconds() -> float:
    """Of the first large activation: what a process pays once (less, if an earlier one left its code in the cache)."""
    start = time.perf_counter()
    lookup.fake_quantize(torch.randn(1, 1024, 1152).bfloat16(), ActivationSpec.parse("fp6"), -1)
    return time.perf_counter() - start


def machine(arguments: argparse.Namespace) -> str:
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("model name", "cpu family"))]
        model = ", ".join(dict.fromkeys(line.replace("\t", "") for line in lines))
    clock = "processor time" if arguments.cpu_time else "wall time"
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    return f"{time.strftime('%Y-%m-%d')}; {model}; {torch.get_num_threads()} thread(s), {clock}; {versions}"


def timed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Callable[[], float]]:
    """The parsed arguments, with --threads and --cpu-time, which take effect; and the clock that they ask for."""
    parser.add_argument("--threads", type=int, help="torch threads (default: as torch chooses)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine; one thread only")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time needs --threads 1: it would count what waiting threads spend")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lookup.PAYS_AFTER = 0  # compile at the first call, as a long run has done by now
    return arguments, time.thread_time if arguments.cpu_time else time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three layers, few turns")
    parser.add_argument("--out", type=Path, help="write every measured second as JSON too")
    arguments, clock = timed(parser)
    watch = Stopwatch(5 if arguments.quick else 15, clock)

    with torch.inference_mode():
        print(machine(arguments), end="\n\n")
        print(f"First large activation: {compile_seconds():.1f} s, compiling included.", end="\n\n")
        layers = measure_layers(arguments.quick, watch)
        print(layers_table(layers), end="\n\n")
        print(memory_table(layers), end="\n\n")
        print("\n".join(f"- missed: {line}" for line in targets(layers)) or "All targets met.", end="\n\n")
        text, fake = measure_fake_quantization(watch)
        print(text)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine(arguments), "layers": layers, "fake": fake}, indent=1))


if __name__ == "__main__":
    main()
