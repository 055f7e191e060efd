"""What kernels of several engines do alike: blocks of 16 and 32, and how the largest of them makes a scale."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmquant.formats import Format, get_format
from dmquant.scaling import Granularity, from_groups, to_groups
from dmquant.stores import SMALLEST, floor_exponent, power_of_two

E2M1, E4M3 = get_format("fp4_e2m1"), get_format("fp8_e4m3")
INT4_GROUPS = "group:64"
LARGEST_BLOCK = E4M3.max * E2M1.max  # NVFP4: the largest value over the base


def in_blocks(x: Tensor, size: int, round_blocks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`round_blocks` of blocks of tokens (n, channels), padded with zeros, and of their largest magnitudes, float32."""
    granularity = Granularity("group", size)
    blocks = to_groups(x, granularity)
    values = round_blocks(blocks.float(), blocks.abs().amax(-1).float())
    return from_groups(values, granularity, (x.shape[1],))


def base_of(x: Tensor) -> Tensor:
    """NVFP4's base for a whole input, rounded to its dtype; float32, 0-dim."""
    return positive((x.abs().amax() / LARGEST_BLOCK).float())


def positive(scale: Tensor) -> Tensor:
    """The scale with ones for zeros, which are those of inputs of zeros: these stay zero."""
    return torch.where(scale == 0, 1, scale)


def nvfp4(x: Tensor, base: Tensor, least: float) -> Tensor:
    """NVFP4 with scales of blocks from `least` times `base` on, values divided by the scale; zeros where it is zero."""

    def round_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
        stored = E4M3.round((largest / E2M1.max / base).clamp(min=least))
        scale = (base * stored).unsqueeze(-1)
        return E2M1.round(blocks / positive(scale)).mul_(scale)

    return in_blocks(x, 16, round_blocks)


def nvfp4_by_reciprocals(x: Tensor, base: Tensor) -> Tensor:
    """NVFP4 as the CUDA kernel of TensorRT-LLM has it, which FlashInfer and vLLM took over (`cvt_warp_fp16_to_fp4`).

    Its reciprocals are approximate, to the last bit; here they are rounded to nearest.
    """
    of_base = 1 / base

    def round_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
        stored = E4M3.round(of_base * (largest * torch.tensor(1 / E2M1.max, device=x.device, dtype=torch.float32)))
        inverse = torch.where(stored == 0, 0, 1 / (stored * (1 / of_base)))
        return E2M1.round(blocks * inverse.unsqueeze(-1)).mul_((stored * base).unsqueeze(-1))

    return in_blocks(x.bfloat16(), 16, round_blocks)


def mx(x: Tensor, fmt: Format) -> Tensor:
    """MX in blocks of 32 with the smallest power of two that clips nothing (cuBLAS' rule, RCEIL of torchao)."""

    def round_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
        wanted = (largest / fmt.max).clamp(min=SMALLEST)
        exponent = floor_exponent(wanted)
        exponent += wanted > power_of_two(exponent)
        scale = power_of_two(exponent).unsqueeze(-1)
        return fmt.round(blocks / scale).mul_(scale)

    return in_blocks(x, 32, round_blocks)


def int4(x: Tensor, scale: None) -> Tensor:
    """SVDQuant's INT4: scales, and quotients before they become integers, are rounded to the input's dtype."""
    granularity = Granularity.parse(INT4_GROUPS)
    groups = to_groups(x, granularity)
    scale = positive(groups.abs().amax(-1, keepdim=True) / 7)
    return from_groups((groups / scale).round().clamp(-7, 7).float() * scale.float(), granularity, (x.shape[1],))


def of_tokens(x: Tensor) -> Tensor:
    """The largest magnitude of each token (n, channels), (n, 1), in its dtype."""
    return x.abs().amax(1, keepdim=True)
