"""What a device can do, by its capability and by trials that are made once."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmquant.formats import Format
from dmquant.gpu.operands import unit

NO_GPU = "an NVIDIA GPU and a build of torch for CUDA: without them layers run on the other kernels"
DEPTH, _SIDE = 4608, 64  # of the products that are tried


def lacks(device: torch.device, capability: tuple[int, int], unit_name: str) -> str | None:
    """Why `device` has no such unit: it is no CUDA device, or of a lower capability; None where it has."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device}"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        needed = ".".join(map(str, capability))
        return f"{unit_name} need capability {needed}, and {device} has {'.'.join(map(str, found))}"
    return None


def worst_operands(fmt: Format, dtype: torch.dtype, up: int, device: torch.device, depth: int = DEPTH) -> Tensor:
    """Operands (_SIDE, depth) of `dtype` on which sums lose most: random ones, largest ones, large ones before small.

    Values of `fmt` in their unit, times powers of two up to 2^up.
    """
    values = (fmt.values / unit(fmt, dtype)).to(device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    chosen = torch.randint(len(values), (_SIDE, depth), generator=generator).to(device)
    octave = torch.randint(up + 1, (_SIDE, -(-depth // 16)), generator=generator).to(device).repeat_interleave(16, 1)
    operands = values[chosen] * torch.exp2(octave[:, :depth].float())
    operands[: _SIDE // 4] = values[-1] * 2.0**up
    operands[_SIDE // 4 : _SIDE // 2, depth // 2 :] = values[values > 0].min()
    operands[_SIDE // 4 : _SIDE // 2, : depth // 2] = values[-1] * 2.0**up
    return operands.to(dtype)


def exact(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> bool:
    """Whether a product of operands (m, k) and (n, k) equals theirs in float64, which is exact."""
    return torch.equal(product(a, b).double(), a.double() @ b.double().T)


def seconds(call: Callable[[], Tensor]) -> float:
    """Of one call on the current CUDA device: the best of three times five, after two that are not counted."""
    spent = []
    for counted in (2, 5, 5, 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(counted):
            call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) / 1e3 / counted)
    return min(spent[1:])
