"""FP4 tensor cores of Blackwell: NVFP4 weights and inputs as they are packed, by torch's product of scaled blocks."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.formats import get_format
from dmquant.gpu.blocked import to_blocked
from dmquant.gpu.device import NO_GPU, lacks
from dmquant.gpu.ops import finish, operator
from dmquant.gpu.product import takes
from dmquant.kernels.reference import Reference
from dmquant.packing import pack
from dmquant.scaling import BLOCK_FORMATS, Granularity, absmax, to_groups
from dmquant.stores import STORES
from dmquant.transforms import Storage

FORMAT, GRANULARITY, STORE = BLOCK_FORMATS["nvfp4"]
SIZE = Granularity.parse(GRANULARITY).size
CAPABILITY, UNIT = (10, 0), "FP4 tensor cores"
_MULTIPLE = 32  # columns and output channels of a product of packed operands


@operator
def quantize_blocks(x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, channels) of so many rows of a batch in NVFP4: packed codes, scales of blocks, bases of tokens.

    Codes are uint8 (n, channels / 2), scales E4M3 as uint8, in the order of `to_blocked`, bases float32 (n,).
    """
    fmt, store = get_format(FORMAT), STORES[STORE]
    groups = to_groups(x.float(), Granularity.parse(GRANULARITY))
    amplitude = absmax(groups)
    base = store.base(amplitude.unflatten(0, (rows, -1)), fmt).expand(-1, len(x) // rows, -1).flatten(0, 1)
    stored = store.encode(amplitude, fmt, base)
    codes = fmt.encode(groups / store.decode(stored, base).unsqueeze(-1))
    return pack(codes.flatten(1), fmt.bits), to_blocked(stored), base.flatten().clone()


@quantize_blocks.register_fake
def _(x, rows):
    codes = x.new_empty(len(x), x.shape[1] // 2, dtype=torch.uint8)
    tiles = -(-len(x) // 128) * 128 * (-(-x.shape[1] // (4 * SIZE)) * 4)
    return codes, x.new_empty(tiles, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)


def product(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The product (m, n) in `dtype` of packed codes (m, k / 2) and (n, k / 2) with blocked scales, all uint8."""
    codes = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2).t()
    scales = a_scales.view(torch.float8_e4m3fn), b_scales.view(torch.float8_e4m3fn)
    block, swizzle = F.ScalingType.BlockWise1x16, F.SwizzleType.SWIZZLE_32_4_4
    return F.scaled_mm(
        *codes, scales[0], block, scales[1], block, swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=dtype
    )


@functools.cache
def sums_in(device: torch.device) -> torch.dtype | str:
    """The dtype in which the device's product can return sums: float32, else bfloat16; or why it has none."""
    side = 128
    codes = torch.full((side, side), 0x22, dtype=torch.uint8, device=device)  # ones: each sum is that of 256
    scales = to_blocked(torch.full((side, 2 * side // SIZE), 0x38, dtype=torch.uint8, device=device))
    reason = "this build of torch has no product of scaled blocks"
    for dtype in (torch.float32, torch.bfloat16):
        try:
            sums = product(codes, codes, scales, scales, dtype)
        except (RuntimeError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            continue
        return dtype if bool((sums == 2 * side).all()) else "FP4 products on this GPU are wrong, by trial"
    return f"FP4 products fail on this GPU: {reason}"


class NvFp4(Reference):
    """One FP4 product a layer, whose blocks of 16 the tensor cores scale; the bases of both sides come after it."""

    name, cost, MAKES_WEIGHTS = "cuda-nvfp4", 8, True
    description = "FP4 tensor cores: NVFP4 weights and inputs, scaled in blocks of 16"

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return NO_GPU
        has = hasattr(torch, "float4_e2m1fn_x2") and hasattr(F, "scaled_mm")
        return None if has else "products of scaled blocks: pip install 'torch>=2.10'"

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        if reason := lacks(device, CAPABILITY, UNIT) or self.refuses_codes(layer):
            return reason
        found = sums_in(device)
        return found if isinstance(found, str) else None

    def refuses_codes(self, layer: nn.Module) -> str | None:
        """Why the layer's codes are not those of an FP4 product, on any device; None where they are."""
        wanted = get_format(FORMAT), Granularity.parse(GRANULARITY), STORE, None
        for what, spec in (("weights", layer.weight_spec), ("inputs", layer.activations)):
            if spec is None or (spec.fmt, spec.granularity, spec.store, spec.split) != wanted:
                return f"{what} are not in nvfp4: {FORMAT}, {GRANULARITY}, scales in {STORE}, no halves"
        if layer.activations.refused:
            return layer.activations.refused
        if layer.activations.ranges is not None or isinstance(layer, nn.Conv2d):
            return "it takes linear layers, with scales of inputs found online"
        if any(type(one).complete is not Storage.complete for one in layer.transforms):
            return "its weights are not the codes alone: some are kept in high precision"
        if any(size % _MULTIPLE for size in layer.weight_shape):
            return f"its shape {tuple(layer.weight_shape)} is not of multiples of {_MULTIPLE}"
        return None

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        base = layer.scales.base.detach().expand(layer.weight_shape[0], 1).flatten().contiguous()
        return {"blocked": to_blocked(layer.scale.detach()), "channel": base}

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not takes(x):
            return super().linear(x, layer)
        tokens = x.reshape(-1, x.shape[-1])
        codes, scales, base = quantize_blocks(tokens, 1 if x.ndim == 1 else len(x))
        sums = product(codes, layer.qweight.detach(), scales, layer.kernel_blocked, sums_in(x.device))
        return finish(sums, base, layer.kernel_channel, layer.bias, x.dtype).view(*x.shape[:-1], -1)


KERNEL = NvFp4()
