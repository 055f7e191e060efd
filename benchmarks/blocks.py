"""Speed of whole blocks on the CPU: a transformer block of PixArt, one of SDXL, and a resnet of SDXL, at full width.

    python benchmarks/blocks.py [--turns 11] [--threads N] [--cpu-time]

Blocks of diffusers with random weights at 1,024 tokens or pixels: full precision in both dtypes and compiled, and every
Linear and Conv2d of the block quantized. Ratios to the faster dtype, median (lower to upper quartile) over turns that
alternate in one process. Attention, norms and activations, which stay as they are, are part of the time.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import dmquant  # before diffusers, for which it makes torchvision importable

import torch  # isort: skip
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from turns import Stopwatch, machine, spread, table, timed
from ways import LONGEST

TOKENS = 1024
FAST = {"weights": "int4", "granularity": "group:16", "store": "int", "activation_granularity": "product"}
RECIPES = {  # settings of the recipe rtn64: those of `fast` with inputs of 8, 6 and 16 bits, and those of `default`
    "W4A8": FAST | {"activations": "int8"},
    "W4A6": FAST | {"activations": "fp6"},
    "W4A16": FAST | {"activations": "none"},
    "W4A6, scales of 16": {"granularity": "group:16", "store": "e4m3", "activation_granularity": "group:16"},
}


def blocks() -> dict[str, tuple[nn.Module, Callable[[nn.Module, torch.dtype], Tensor]]]:
    """Blocks in float32 and how each is called in a dtype, by name."""
    pixart = BasicTransformerBlock(
        1152,
        16,
        72,
        cross_attention_dim=1152,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    sdxl = BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048, activation_fn="geglu")
    resnet = ResnetBlock2D(in_channels=640, out_channels=640, temb_channels=1280)
    tokens, captions, modulation = torch.randn(1, TOKENS, 1152), torch.randn(1, 300, 1152), torch.randn(1, 6 * 1152)
    sdxl_tokens, sdxl_captions = torch.randn(1, TOKENS, 1280), torch.randn(1, 77, 2048)
    pixels, embedding = torch.randn(1, 640, 32, 32), torch.randn(1, 1280)
    return {
        "PixArt transformer block": (
            pixart,
            lambda block, dtype: block(
                tokens.to(dtype), encoder_hidden_states=captions.to(dtype), timestep=modulation.to(dtype)
            ),
        ),
        "SDXL transformer block, 1,280": (
            sdxl,
            lambda block, dtype: block(sdxl_tokens.to(dtype), encoder_hidden_states=sdxl_captions.to(dtype)),
        ),
        "SDXL resnet, 640 at 32x32": (resnet, lambda block, dtype: block(pixels.to(dtype), embedding.to(dtype))),
    }


def quantized(block: nn.Module, settings: dict[str, str]) -> nn.Module:
    twin = nn.Sequential(copy.deepcopy(block))
    dmquant.quantize_(twin, dmquant.Recipe.load("rtn64").with_settings(scale="absmax", keep="none", **settings))
    return twin[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=11)
    arguments, clock = timed(parser)
    watch, dtypes = Stopwatch(arguments.turns, clock), {"fp32": torch.float32, "bf16": torch.bfloat16}
    print(machine(arguments), end="\n\n")
    rows, names = [], [*dtypes, "compiled", *RECIPES]
    with torch.no_grad():
        for title, (block, call) in blocks().items():
            floats = {name: partial(call, copy.deepcopy(block).to(dtype), dtype) for name, dtype in dtypes.items()}
            floats = {name: one for name, one in floats.items() if bearable(one)}
            seconds = Stopwatch(3, clock).run(floats)
            base = min(seconds, key=lambda name: statistics.median(seconds[name]))
            dtype, block = dtypes[base], block.to(dtypes[base])
            ways = {name: quantized(block, settings) for name, settings in RECIPES.items()}
            ways["compiled"] = torch.compile(block, dynamic=False)
            seconds = watch.run(floats | {name: partial(call, way, dtype) for name, way in ways.items()})
            ratios = {
                name: spread(a / b for a, b in zip(values, seconds[base], strict=True))
                for name, values in seconds.items()
            }
            milliseconds = spread((1e3 * value for value in seconds[base]), 1)
            rows.append([title, base, milliseconds, *(ratios.get(name, f"over {LONGEST:.0f} s") for name in names)])
    print(table(["block", "faster dtype", "its ms", *names], rows))


def bearable(call: Callable[[], Tensor]) -> bool:
    """Whether a call takes no more than LONGEST seconds; the first prepares."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start < LONGEST


if __name__ == "__main__":
    main()
