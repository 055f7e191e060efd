"""What the kernels of integer and of FP8 tensor cores share: operands, padding, patches of convolutions."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import static_scale
from dmquant.gpu import operands
from dmquant.gpu.device import NO_GPU, lacks
from dmquant.gpu.ops import expand, quantize_tokens
from dmquant.gpu.patches import mixes_tokens, patches
from dmquant.kernels import weights_kept
from dmquant.kernels.reference import Reference
from dmquant.scaling import fit_absmax


class Product(Reference):
    """A product of two operands of one byte, whose scales come after it.

    Its sums are those of real arithmetic where they are exact; the reference rounds operands to the input's dtype.
    """

    MAKES_WEIGHTS = True
    dtype: torch.dtype
    capability: tuple[int, int]
    unit_name: str
    MULTIPLE: int
    """Columns and output channels of the operands are padded to multiples of this."""
    FEWEST = 32
    """Rows that the first operand has at least."""

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else NO_GPU

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        return lacks(device, self.capability, self.unit_name) or self.refuses_codes(layer) or self.fails(layer, device)

    def refuses_codes(self, layer: nn.Module) -> str | None:
        """Why the layer's codes are no operands, on any device; None where they are."""
        if reason := operands.why_no_inputs(layer.activations, mixes_tokens(layer), self.dtype):
            return reason
        try:
            operands.operand(layer, self.dtype)
        except ValueError as error:
            return str(error)
        return None

    def fails(self, layer: nn.Module, device: torch.device) -> str | None:
        """Why a trial on the device speaks against it; None where it does not."""
        raise NotImplementedError

    def multiply(self, codes: Tensor, token: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """The product (tokens, out) in `dtype` of an operand (rows, columns) with scales (tokens,) and the weight."""
        raise NotImplementedError

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        made = operands.operand(layer, self.dtype)
        parts = {"table": made.table, "factors": made.factors, "shift": made.shift}
        if weights_kept() == "speed":
            return {"channel": made.channel, "weight": self._expanded(layer, **parts)}
        return {"channel": made.channel} | {name: part for name, part in parts.items() if part is not None}

    def weight(self, layer: nn.Module) -> Tensor:
        """The weight as an operand (output channels, columns), padded; kept, or expanded from the codes now."""
        kept = layer._buffers
        if "kernel_weight" in kept:
            return kept["kernel_weight"]
        return self._expanded(layer, *(kept.get(f"kernel_{part}") for part in ("table", "factors", "shift")))

    def _expanded(self, layer: nn.Module, table: Tensor, factors: Tensor | None, shift: Tensor | None) -> Tensor:
        spec, rows, columns = layer.weight_spec, layer.weight_shape[0], prod(layer.weight_shape[1:])
        size, whole = spec.granularity.size or columns, (self.padded(rows), self.padded(columns))
        codes, stored = layer.qweight.detach(), None if factors is None else layer.scales.stored.detach()
        return expand(codes, table, stored, shift, factors, spec.fmt.bits, columns, size, self.dtype, *whole)

    def padded(self, size: int) -> int:
        return size + -size % self.MULTIPLE

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not takes(x):
            return super().linear(x, layer)
        tokens = x.reshape(-1, x.shape[-1])
        rows = max(self.FEWEST, self.padded(len(tokens)))
        codes, token = self._quantized(x, tokens, layer, rows, self.padded(tokens.shape[1]))
        return self.multiply(codes, token, layer, x.dtype).view(*x.shape[:-1], -1)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not takes(x):
            return super().conv2d(x, layer)
        images = x if x.ndim == 4 else x.unsqueeze(0)
        pixels = images.movedim(1, -1)
        tokens = pixels.reshape(-1, pixels.shape[-1])
        codes, token = self._quantized(images, tokens, layer, len(tokens), tokens.shape[1])
        # As integers, which can be padded and copied everywhere.
        matrix, (batch, height, width) = patches(codes.view(torch.int8).view(pixels.shape), layer)
        rows = max(self.FEWEST, self.padded(len(matrix)))
        padding = (0, self.padded(matrix.shape[1]) - matrix.shape[1], 0, rows - len(matrix))
        matrix = F.pad(matrix, padding) if any(padding) else matrix
        if mixes_tokens(layer):  # one scale for all tokens of an image, or NaN where one of them is
            token = token.view(len(pixels), -1).amax(1).repeat_interleave(height * width)
        y = self.multiply(matrix.view(self.dtype), token, layer, x.dtype)
        y = y.view(batch, height, width, -1).movedim(-1, 1)
        return y if x.ndim == 4 else y.squeeze(0)

    def _quantized(self, x: Tensor, tokens: Tensor, layer: nn.Module, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The operand (rows, columns) of the tokens of `x`, and their scales."""
        spec, scale = layer.activations, None
        if spec.ranges is not None:
            scale = static_scale(layer.input_scale.view(torch.float32), layer.timestep_ranges, x, layer.channel_dim)
        elif spec.granularity.kind != "token":
            alike = x.unsqueeze(0) if spec.granularity.kind == "tensor" or x.ndim == 1 else x
            largest = alike.abs().flatten(1).amax(1).float().view(-1, 1, 1)
            scale = fit_absmax(largest, spec.fmt, spec.store).decode()
        if scale is not None:
            scale = scale.flatten().repeat_interleave(len(tokens) // scale.numel())
        return quantize_tokens(tokens, scale, spec.fmt.name, spec.store, self.dtype, rows, columns)


def takes(x: Tensor) -> bool:
    """Whether this call is for operands: no gradient goes through it, and there is something in it."""
    gradient = torch.is_grad_enabled() and x.requires_grad
    return x.numel() > 0 and not gradient and not torch.is_autocast_enabled(x.device.type)
