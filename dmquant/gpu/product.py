"""What the kernels of integer and of FP8 tensor cores share: operands, padding, patches of convolutions."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import online_scale, static_scale
from dmquant.gpu import operands
from dmquant.gpu.device import NO_GPU, lacks
from dmquant.gpu.ops import expand, quantize_tokens
from dmquant.gpu.patches import mixes_tokens, patches
from dmquant.kernels.reference import Reference


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
        inputs = operands.why_no_inputs(layer.activations, mixes_tokens(layer), self.dtype)
        return inputs or operands.why_no_weights(layer, self.dtype)

    def fails(self, layer: nn.Module, device: torch.device) -> str | None:
        """Why a trial on the device speaks against it; None where it does not."""
        raise NotImplementedError

    def multiply(self, codes: Tensor, token: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """The product (tokens, out) in `dtype` of an operand (rows, columns) with scales (tokens,) and the weight."""
        raise NotImplementedError

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        made = operands.factors(layer, self.dtype)
        if operands.keeps_expanded():
            return {"channel": made.channel, "weight": self._expanded(layer, made.table, made.anchor)}
        kept = {"channel": made.channel, "table": made.table}
        return kept if made.anchor is None else kept | {"anchor": made.anchor}

    def weight(self, layer: nn.Module) -> Tensor:
        """The weight as an operand (output channels, columns), padded; kept, or expanded from the codes now."""
        kept = getattr(layer, "kernel_weight", None)
        if kept is not None:
            return kept
        return self._expanded(layer, layer.kernel_table, getattr(layer, "kernel_anchor", None))

    def _expanded(self, layer: nn.Module, table: Tensor, anchor: Tensor | None) -> Tensor:
        spec, (rows, *rest) = layer.weight_spec, layer.weight_shape
        columns = prod(rest)
        stored = None if anchor is None else layer.scale.detach()
        size = spec.granularity.size or columns
        whole = (self.padded(rows), self.padded(columns))
        return expand(
            layer.qweight.detach(), table, stored, anchor, None, spec.fmt.bits, columns, size, self.dtype, *whole
        )

    def padded(self, size: int) -> int:
        return size + -size % self.MULTIPLE

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        rows = max(self.FEWEST, self.padded(len(tokens)))
        codes, token = self._quantized(x, tokens, layer, rows, self.padded(tokens.shape[1]))
        return self.multiply(codes, token, layer, x.dtype).view(*x.shape[:-1], -1)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        pixels = (x if x.ndim == 4 else x.unsqueeze(0)).movedim(1, -1)
        tokens = pixels.reshape(-1, pixels.shape[-1])
        codes, token = self._quantized(x, tokens, layer, len(tokens), tokens.shape[1])
        # As integers, which can be padded and copied everywhere.
        matrix, (batch, height, width) = patches(codes.view(torch.int8).view(pixels.shape), layer)
        rows = max(self.FEWEST, self.padded(len(matrix)))
        padding = (0, self.padded(matrix.shape[1]) - matrix.shape[1], 0, rows - len(matrix))
        matrix = F.pad(matrix, padding) if any(padding) else matrix
        if mixes_tokens(layer):  # one scale for all tokens of an image
            token = token.view(len(pixels), -1)[:, :1].expand(-1, height * width).flatten()
        y = self.multiply(matrix.view(self.dtype), token, layer, x.dtype)
        y = y.view(batch, height, width, -1).movedim(-1, 1)
        return y if x.ndim == 4 else y.squeeze(0)

    def _quantized(self, x: Tensor, tokens: Tensor, layer: nn.Module, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The operand (rows, columns) of the tokens of `x`, and their scales."""
        spec, scale = layer.activations, None
        if spec.ranges is not None:
            of_rows = static_scale(layer.input_scale.view(torch.float32), layer.timestep_ranges, x, layer.channel_dim)
            scale = of_rows.flatten().repeat_interleave(len(tokens) // max(1, of_rows.numel()))
        elif spec.granularity.kind == "tensor":
            scale = online_scale(x.abs().amax().float().view(1, 1, 1), 1, spec).flatten().expand(len(tokens))
        return quantize_tokens(tokens, scale, spec.fmt.name, spec.store, self.dtype, rows, columns)
