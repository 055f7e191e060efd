"""Speed and memory of quantized layers on a GPU against bfloat16 and row-wise FP8.

    python benchmarks/gpu_layers.py [--quick] [--device cuda] [--turns 20]

Each way runs as it is called (eager) and replayed as a CUDA graph, where launches cost nothing; torch's own two ways
are compiled for that. Ways of a row take turns; a time is the median over turns, of CALLS calls between two events, and
ratios are medians of the ratios of turns to bfloat16 in a graph. Memory is what a call allocates at its peak
(`max_memory_allocated`), and what the layer holds. With `--device cpu` the script runs on processor time and without
graphs, for a look at it where there is no GPU; kernels of GPUs then say why they do not run.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from layers import CONVOLUTIONS, LINEARS, table
from torch import Tensor, nn

from dmquant import kernels
from dmquant.activations import ActivationSpec
from dmquant.errors import UsageError
from dmquant.gpu.operands import E4M3
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec

CALLS = 10
BASE = "bf16"
RECIPES = {  # weights, granularity, store; inputs
    "W4A16": (("fp4", "group:16", "e4m3"), None),
    "W4A6": (("fp4", "group:32", "pow2:2"), "fp6"),
    "W4A8": (("int4", "group:16", "int"), "int8"),
    "W6A6": (("fp6", "channel", "fp32"), "fp6"),
    "W8A8": (("fp8", "channel", "fp32"), "fp8"),
    "NVFP4": (("nvfp4", "group:16", "e4m3"), "nvfp4"),
}
EXPANDING = ("cuda-int8", "cuda-fp8")  # kernels that can keep weights at 8 bits
KERNELS = ("cuda-int8", "cuda-fp8", "cuda-nvfp4", "cuda", "reference")


class RowWiseFp8(nn.Module):
    """What others do in FP8: weights with a scale a channel, inputs with one a token, `torch._scaled_mm`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        scale = layer.weight.detach().float().abs().amax(1, keepdim=True) / 448
        self.bias = layer.bias
        self.register_buffer("weight", (layer.weight.detach() / scale).to(E4M3))
        self.register_buffer("scale", scale.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scale = tokens.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        codes = (tokens / scale).clamp(-448, 448).to(E4M3)
        y = torch._scaled_mm(codes, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], -1)


class Way:
    """A module, and the kernel that runs it, if one is forced."""

    def __init__(self, module: nn.Module, kernel: str | None = None, kept: str = "memory"):
        self.module, self.kernel, self.kept = module, kernel, kept

    def __call__(self, x: Tensor) -> Tensor:
        with kernels.forced(self.kernel), kernels.keeping_weights(self.kept):
            return self.module(x)

    def compiled(self) -> "Way":
        torch._dynamo.reset()
        return Way(torch.compile(self.module, fullgraph=True), self.kernel, self.kept)


def ways(layer: nn.Module, x: Tensor) -> tuple[dict[str, Way], list[str]]:
    """Every way to run the layer, by name, and why others do not run here."""
    made, refused = {BASE: Way(layer)}, []
    if isinstance(layer, nn.Linear):
        made["fp8 row-wise"] = Way(RowWiseFp8(layer))
    of = "token" if isinstance(layer, nn.Linear) else "image"
    for recipe, (weights, inputs) in RECIPES.items():
        spec = WeightSpec.parse(weights[0], weights[1], "absmax", weights[2])
        activations = None if inputs is None else ActivationSpec.parse(inputs, of)
        for name in KERNELS:
            for kept in kernels.KEPT if name in EXPANDING else kernels.KEPT[:1]:
                quantized, kernel = (
                    quantize_layer(layer, spec, activations).requires_grad_(False),
                    kernels.KERNELS[name],
                )
                if reason := kernel.refuses(quantized, x.device) or kernel.missing():
                    refused.append(f"{recipe} by {name}: {reason}")
                else:
                    made[f"{recipe} {name}, {kept}"] = Way(quantized, name, kept)
    return made, refused


def graphed(call: Way, x: Tensor) -> Callable[[], object]:
    """A CUDA graph of a call on this input, warmed up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x)
    return graph.replay


def seconds(call: Callable[[], object], cuda: bool) -> float:
    """Of one call, over CALLS of them."""
    if not cuda:
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS


def bytes_of(call: Way, x: Tensor) -> tuple[int, int]:
    """What the layer holds, with its kernel's own weights, and what a call allocates at its peak."""
    call(x)
    held = sum(one.nbytes for one in (*call.module.parameters(), *call.module.buffers()))
    if x.device.type != "cuda":
        return held, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(x)
    torch.cuda.synchronize()
    return held, torch.cuda.max_memory_allocated() - before


def measure(layer: nn.Module, x: Tensor, turns: int) -> tuple[list[list[str]], list[str]]:
    """Table rows, and why some ways have none."""
    cuda, (made, failed) = x.device.type == "cuda", ways(layer, x)
    calls, memory = {}, {}
    for name, call in made.items():
        try:
            memory[name] = bytes_of(call, x)
            calls[name, "eager"] = lambda call=call: call(x)
            if cuda:
                calls[name, "graph"] = graphed(call.compiled() if call.kernel is None else call, x)
        except (RuntimeError, UsageError) as error:
            failed.append(f"{name}: {str(error).splitlines()[0]}")
    times = {which: [] for which in calls}
    for _ in range(turns):
        for which, call in calls.items():
            times[which].append(seconds(call, cuda))
    base = times[BASE, "graph" if cuda else "eager"]
    rows = []
    for name in dict.fromkeys(name for name, _ in calls):
        row = [name]
        for how in ("eager", "graph"):
            of = times.get((name, how))
            ratio = statistics.median(a / b for a, b in zip(of, base, strict=True)) if of else 0
            row.append(f"{1e6 * statistics.median(of):,.0f} ({ratio:.2f})" if of else "not measured")
        rows.append([*row, *(f"{count / 2**20:.2f}" for count in memory[name])])
    return rows, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="two layers")
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    where, linears = arguments.device, LINEARS[:1] if arguments.quick else LINEARS
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU, not a measurement of GPU kernels"
    print(f"{time.strftime('%Y-%m-%d')}; {name}; torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    cases = [(f"{n} {k}→{m}, {t:,} tokens", nn.Linear(k, m), (1, t, k)) for n, k, m, t in linears]
    for k, m, size in CONVOLUTIONS[:1] if arguments.quick else CONVOLUTIONS:
        cases.append((f"conv {k}→{m} 3x3 at {size}x{size}", nn.Conv2d(k, m, 3, padding=1), (1, k, size, size)))
    with torch.inference_mode():
        for title, layer, shape in cases:
            layer, x = layer.to(where, torch.bfloat16), torch.randn(shape, device=where).bfloat16()
            if len(shape) == 4:
                layer, x = (one.to(memory_format=torch.channels_last) for one in (layer, x))
            rows, failed = measure(layer, x, arguments.turns)
            print(f"### {title}\n")
            header = [
                "way",
                "eager, us (/ bf16)",
                "in a graph, us (/ bf16)",
                "layer, MiB",
                "a call's peak, MiB",
            ]
            print(table(header, rows), end="\n\n")
            print("".join(f"- not run: {line}\n" for line in dict.fromkeys(failed)), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
