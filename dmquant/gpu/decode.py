"""Weights expanded in one launch, inputs rounded in one read and one write, then a product in the input's dtype."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant import activations
from dmquant.activations import ActivationSpec, in_parts
from dmquant.gpu.device import NO_GPU
from dmquant.gpu.ops import expand, round_tokens
from dmquant.grids import ScaledGrid
from dmquant.kernels.reference import Reference
from dmquant.scaling import from_matrix
from dmquant.stores import get_store


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int, scale: Tensor | None = None) -> Tensor:
    """As `activations.fake_quantize`, bit for bit; same shape and dtype as `x`."""
    if scale is not None or spec.engine is not None:
        return activations.fake_quantize(x, spec, dim, scale)
    if spec.center or spec.split is not None:
        return in_parts(fake_quantize, x, spec, dim)
    if spec.refused:
        return activations.fake_quantize(x, spec, dim)
    tokens = x.movedim(dim, -1)
    rows = 1 if dim % x.ndim == 0 else len(x)
    matrix = tokens.reshape(-1, tokens.shape[-1])
    rounded = round_tokens(matrix, spec.fmt.name, str(spec.granularity), spec.store, rows)
    return rounded.view(tokens.shape).movedim(-1, dim)


class Decode(Reference):
    """The reference's results, bit for bit but for the order of the product's sums, in fewer launches."""

    name, cost, MAKES_WEIGHTS = "cuda", 50, True
    description = "expands weights in one launch, rounds inputs in one, multiplies in the input's dtype"
    fake_quantize = staticmethod(fake_quantize)

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else NO_GPU

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        return self.refuses_codes(layer) if device.type == "cuda" else f"it runs on CUDA, not on {device}"

    def refuses_codes(self, layer: nn.Module) -> str | None:
        """Why it cannot expand the layer's codes, on any device; None where it can."""
        spec = layer.weight_spec
        if spec.grid_type is not ScaledGrid:
            return "weights by tables of values"
        first, *rest = spec.segments(layer.weight_shape)
        if rest and first % (spec.granularity.size or first + 1):
            return "the halves of its input have weight scales of their own, and groups do not divide the first"
        return None

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        spec, device = layer.weight_spec, layer.qweight.device
        codes = torch.arange(1 << spec.fmt.bits, dtype=torch.uint8, device=device)
        made, store = {"table": spec.fmt.decode(codes)}, get_store(spec.store)
        if store.dtype == torch.uint8:
            one = torch.ones((), device=device, dtype=torch.float32)
            stored = torch.arange(256, dtype=torch.uint8, device=device)
            made["scale_table"] = store.decode(stored, None if store.base_of is None else one).nan_to_num(0.0)
            base = layer.scales.base
            made["base"] = one.view(1) if base is None else base.detach().flatten().clone()
        return made

    def weight(self, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """As `layer.dequantize`, (out, in, ...), from stored scales."""
        spec, shape = layer.weight_spec, layer.weight_shape
        columns, parts = prod(shape[1:]), layer._buffers
        matrix = expand(
            layer.qweight.detach(), layer.kernel_table, layer.scales.stored.detach(), parts.get("kernel_base"),
            parts.get("kernel_scale_table"), spec.fmt.bits, columns, spec.granularity.size or columns, dtype,
            shape[0], columns,
        )  # fmt: skip
        return layer.complete(from_matrix(matrix, shape, spec.split))

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        return F.linear(layer.quantize_input(x), self.weight(layer, x.dtype), layer.bias)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer._conv_forward(layer.quantize_input(x), self.weight(layer, x.dtype), layer.bias)


KERNEL = Decode()
