"""Ways to run a layer: torch's own, dmquant's, other libraries'; each makes a call from a float32 layer and an input.

Other libraries are installed each into a folder of its own below one folder (`python benchmarks/layers.py --install`):
their requirements do not agree, and none may bring another torch.
"""

import contextlib
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmquant import kernels
from dmquant.activations import ActivationSpec
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec

Call = Callable[[], Tensor]
FAST = ("int4", "group:16", "absmax", "int")  # as the recipe `fast`, without data
DEFAULT = ("fp4", "group:16", "absmax", "e4m3")
LONGEST = 3.0  # seconds a call: beyond, a way is not timed


@dataclass(frozen=True)
class Quantized:
    """A call of a layer of dmquant's, and what is known of it."""

    layer: nn.Module
    x: Tensor
    kernel: str
    bits: float
    """A weight, with scales, bias and what the kernel keeps."""

    def __call__(self) -> Tensor:
        return self.layer(self.x)


class UnmeasuredError(Exception):
    """Why a way does not run a layer here."""


@dataclass(frozen=True)
class Way:
    """`make` gives a call from a float32 layer, its input and the dtype that is torch's fastest here."""

    name: str
    make: Callable[[nn.Module, Tensor, torch.dtype], Call]
    process: str
    """Ways of one process take turns; a peer has a process of its own."""
    packages: tuple[str, ...] = ()
    """What pip installs for it, pinned, and how a worker finds it."""
    kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)


def float_way(dtype: torch.dtype, compiled: bool = False) -> Callable[[nn.Module, Tensor, torch.dtype], Call]:
    def make(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
        twin, inputs = copy.deepcopy(layer).to(dtype), x.to(dtype)
        if isinstance(layer, nn.Conv2d):  # without instructions for it, a convolution in 16 bits takes minutes
            corner = inputs[..., :8, :8].contiguous()
            start = time.perf_counter()
            twin(corner)
            seconds = (time.perf_counter() - start) * inputs.numel() / corner.numel()
            if dtype != torch.float32 and seconds > LONGEST:
                raise UnmeasuredError(f"about {seconds:.0f} s a call")
        if compiled:
            twin = torch.compile(twin, dynamic=False)
        return lambda: twin(inputs)

    return make


def dmquant_way(weights: tuple[str, ...], inputs: tuple[str, ...] | None, kept: str = "memory", dtype=None):
    def make(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
        one_product = "image" if isinstance(layer, nn.Conv2d) else "token"
        activations = ActivationSpec.parse(*(inputs if len(inputs) > 1 else (*inputs, one_product))) if inputs else None
        quantized = quantize_layer(layer.to(dtype or base), WeightSpec.parse(*weights), activations)
        x = x.to(dtype or base)
        with kernels.keeping_weights(kept):
            quantized(x)
        kept_bytes = sum(tensor.nbytes for tensor in (*quantized.parameters(), *quantized.buffers()))
        return Quantized(quantized, x, quantized.kernel, 8 * kept_bytes / layer.weight.numel())

    return make


def torchao_int4(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model, x = nn.Sequential(layer.bfloat16()), x.bfloat16()  # it takes no other dtype
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=64))
    return lambda: model(x)


def torchao_int8(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model, x = nn.Sequential(layer.to(base)), x.to(base)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model, dynamic=False)
    return lambda: compiled(x)


def sdnq(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    from sdnq import sdnq_post_load_quant

    x = x.to(base)
    model = sdnq_post_load_quant(
        nn.Sequential(layer.to(base)),
        weights_dtype="uint4",
        use_quantized_matmul=True,
        quant_conv=True,
        use_quantized_matmul_conv=True,
        torch_dtype=base,
    )
    return lambda: model(x)


def bitsandbytes(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=base, quant_type="nf4")
    made.load_state_dict(layer.state_dict())
    made, x = made.to("cpu"), x.to(base)
    return lambda: made(x)


def quanto(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    from optimum.quanto import freeze, qint4, quantize

    model, x = nn.Sequential(layer.to(base)), x.to(base)
    quantize(model, weights=qint4)
    freeze(model)
    return lambda: model(x)


def hqq(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    x = x.to(base)
    made = HQQLinear(layer, BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=base, device="cpu")
    return lambda: made(x)


def gguf(layer: nn.Module, x: Tensor, base: torch.dtype) -> Call:
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = library.GGMLQuantizationType.Q4_0
    made = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=base)
    packed = torch.from_numpy(library.quants.quantize(layer.weight.detach().numpy(), kind))
    made.weight, made.bias, x = GGUFParameter(packed, quant_type=kind), layer.bias, x.to(base)
    return lambda: made(x)


FLOAT32, BFLOAT16 = "torch fp32", "torch bf16"
LINEAR = (nn.Linear,)
WAYS = [
    Way(FLOAT32, float_way(torch.float32), "torch"),
    Way(BFLOAT16, float_way(torch.bfloat16), "torch"),
    Way("torch fp32, compiled", float_way(torch.float32, compiled=True), "torch"),
    Way("torch bf16, compiled", float_way(torch.bfloat16, compiled=True), "torch"),
    Way("dmquant W4A8", dmquant_way(FAST, ("int8",)), "dmquant"),
    Way("dmquant W4A8, speed", dmquant_way(FAST, ("int8",), "speed"), "dmquant"),
    Way("dmquant W4A6", dmquant_way(FAST, ("fp6",)), "dmquant"),
    Way("dmquant W4A6, speed", dmquant_way(FAST, ("fp6",), "speed"), "dmquant"),
    Way("dmquant W4A16", dmquant_way(FAST, None), "dmquant"),
    Way("dmquant W4A16, bf16 input", dmquant_way(FAST, None, dtype=torch.bfloat16), "dmquant"),
    Way("dmquant W4A6, scales of 16", dmquant_way(DEFAULT, ("fp6", "group:16")), "dmquant"),
    Way("torchao int4", torchao_int4, "torchao int4", ("torchao==0.18.0",), LINEAR),
    Way("torchao int8 dynamic, compiled", torchao_int8, "torchao int8", ("torchao==0.18.0",), LINEAR),
    Way("sdnq uint4, int8 products", sdnq, "sdnq", ("sdnq==0.2.8",)),
    Way("sdnq uint4, OpenVINO", sdnq, "sdnq openvino", ("sdnq==0.2.8", "openvino==2026.4.1")),
    Way("bitsandbytes NF4", bitsandbytes, "bitsandbytes", ("bitsandbytes==0.50.2",), LINEAR),
    Way("quanto int4", quanto, "quanto", ("optimum-quanto==0.2.7", "ninja"), LINEAR),
    Way("hqq 4 bit", hqq, "hqq", ("hqq==0.2.8.post1", "termcolor"), LINEAR),
    Way("gguf Q4_0 in diffusers", gguf, "gguf", ("gguf==0.19.0",), LINEAR),
]


def folder_of(package: str) -> str:
    return package.partition("==")[0]


def install(peers: Path) -> None:
    """Every other library into its folder below `peers`, without what it would bring along."""
    for package in sorted({package for way in WAYS for package in way.packages}):
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(peers / folder_of(package))]
        if subprocess.run([*command, package]).returncode:
            print(f"{package}: not installed", file=sys.stderr)


def environment(process: str, peers: Path | None) -> dict[str, str] | None:
    """The environment of a worker that finds its packages; None where one is not installed."""
    needed = {package for way in WAYS if way.process == process for package in way.packages}
    folders = [(peers or Path()) / folder_of(package) for package in sorted(needed)]
    if needed and (peers is None or not all(folder.is_dir() for folder in folders)):
        return None
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    programs = os.pathsep.join([*(str(folder / "bin") for folder in folders), os.environ.get("PATH", "")])
    return os.environ | {"PYTHONPATH": path, "PATH": programs}


@contextlib.contextmanager
def reasons():
    """Turn whatever another library raises into UnmeasuredError, in one line."""
    try:
        yield
    except UnmeasuredError:
        raise
    except Exception as error:  # any library may raise anything
        line = " ".join(str(error).split())[:100]
        raise UnmeasuredError(f"{type(error).__name__}: {line}") from error
