"""CPU: the product of integer codes in one pass, with exact sums; dmquant/operands.py says which layers have it.

Inputs are rounded to the reference's values bit for bit. The sum is exact, scales and bias are applied in float32, and
the result is rounded once: it is nearer to real arithmetic than the reference, which it equals within that one's own
rounding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec, static_scale
from dmquant.cpu import products
from dmquant.cpu.addresses import is_plain
from dmquant.cpu.compiling import missing_compiler
from dmquant.cpu.products import Plan, Weight
from dmquant.formats import Format, get_format
from dmquant.kernels import weights_kept
from dmquant.kernels.chosen import PREFIX
from dmquant.kernels.reference import Reference
from dmquant.operands import integer_weight, unit_of


class Integer(Reference):
    """Codes as bytes, their products summed in int32 by the instructions that this processor has for it."""

    name, cost, MAKES_WEIGHTS = "integer", 10, True
    description = "multiplies codes as integers: exact sums, one pass over the input"

    def missing(self) -> str | None:
        if products.compiled() is None:
            return missing_compiler() or "a C++ compiler that compiles integer.cpp: the log says why this one does not"
        if products.level() == 0:
            return "instructions for products of bytes: a processor with AVX2"
        return products.wrong(products.level())

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if reason := _input_refused(layer.activations) or _shape_refused(layer):
            return reason
        if layer.qweight.is_meta:  # while it is calibrated
            return "its weight is not decided yet"
        try:
            largest = integer_weight(layer).largest
        except ValueError as error:
            return str(error)
        fmt = layer.activations.fmt
        if products.compiled() and largest > (most := products.largest_weight(fmt, products.level())):
            level = products.LEVELS[products.level()]
            return f"integers up to {largest} times inputs in {fmt.name}: {level} is exact up to {most}"
        dtype = torch.bfloat16 if layer.dtype == torch.bfloat16 else torch.float32
        if products.compiled() and (faster := products.slower(dtype)):
            return f"products in {faster} are faster on this processor"
        return None

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = integer_weight(layer)
        outputs = weight.scale * unit_of(layer.activations.fmt)
        made = {"tables": weight.tables(), "factors": weight.factors, "outputs": outputs}
        if weights_kept() == "speed":
            plan = _plan(layer.qweight, *made.values(), [], None, layer.activations.fmt, _about(layer))
            for half, (panels, sums) in enumerate(plan.expanded()):
                made[f"panels{half}"], made[f"sums{half}"] = panels, sums
        return made

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        return _run(x, layer, ()) if _takes(x) else super().linear(x, layer)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not _takes(x):
            return super().conv2d(x, layer)
        geometry = *layer.stride, *layer.padding, *layer.dilation
        return _run(x, layer, geometry) if x.ndim == 4 else _run(x.unsqueeze(0), layer, geometry).squeeze(0)


def _takes(x: Tensor) -> bool:
    """Whether this call is for integers: no gradient goes through it, and it has rows of tokens in a common dtype."""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0 and x.ndim > 1
    fits = fits and not (torch.is_grad_enabled() and x.requires_grad) and not torch.is_autocast_enabled("cpu")
    return fits and (torch.compiler.is_compiling() or is_plain(x))


def _input_refused(spec: ActivationSpec | None) -> str | None:
    """Why inputs quantized so are no operands of one exact product; None where they are."""
    if spec is None:
        return "its inputs are not quantized"
    if spec.refused:
        return spec.refused
    if unit_of(spec.fmt) is None:
        return f"inputs in {spec.fmt.name} are no small integers"
    if spec.ranges is not None and (spec.granularity.kind != "tensor" or spec.split is not None):
        return "static scales of channels cannot be taken out of a sum over channels"
    if spec.ranges is None and spec.store != "fp32":
        return f"scales of inputs are in {spec.store}: it takes fp32"
    if spec.granularity.kind not in ("token", "image", "tensor"):
        return f"inputs have a scale for every {spec.granularity}: it takes one a token, an image or a tensor"
    return None


def _shape_refused(layer: nn.Module) -> str | None:
    """Why a layer of this shape is no single product of rows of codes; None where it is."""
    spec, shape = layer.weight_spec, layer.weight_shape
    if any(columns * spec.fmt.bits % 8 for columns in spec.segments(shape)[:-1]):
        return "the second half of its weights begins within a byte"
    if max(spec.segments(shape)) > products.WIDEST:
        return f"sums over {max(spec.segments(shape))} columns may not fit 32 bits"
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return "it takes convolutions of one group, padded with numbers of zeros"
        single = _is_single(layer.kernel_size, (*layer.stride, *layer.padding))
        if layer.activations.granularity.kind == "token" and not single:
            return "a scale for every pixel cannot be taken out of a sum over pixels: use activation_granularity: image"
    return None


def _is_single(kernel: Sequence[int], geometry: Sequence[int]) -> bool:
    """Whether a convolution is a product of every pixel by itself."""
    return all(one == 1 for one in (*kernel, *geometry[:2])) and not any(geometry[2:4])


def _about(layer: nn.Module) -> list[int]:
    """What a plan needs to know besides tensors: the size of a group, split, shape."""
    spec = layer.weight_spec
    return [spec.granularity.size or products.WHOLE, spec.split or 0, *layer.weight_shape]


def _plan(
    packed: Tensor,
    tables: Tensor,
    factors: Tensor,
    outputs: Tensor,
    kept: Sequence[Tensor],
    bias: Tensor | None,
    fmt: Format,
    about: Sequence[int],
) -> Plan:
    size, split, _, channels, *kernel = about
    parts = (split, channels - split) if split else (channels,)
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16):
        bias = bias.float()
    weight = Weight(packed, tables, factors, outputs, bias, fmt, size, parts, math.prod(kernel))
    return Plan(weight, tuple(zip(kept[::2], kept[1::2], strict=True)))


def _run(x: Tensor, layer: nn.Module, geometry: Sequence[int]) -> Tensor:
    spec, given = layer.activations, None
    if spec.ranges is not None:
        fitted = layer.input_scale.view(torch.float32)
        given = static_scale(fitted, layer.timestep_ranges, x, layer.channel_dim).flatten()
    kind = spec.granularity.kind
    if torch.compiler.is_compiling():
        made = _made(layer), layer.bias, given, spec.fmt.name, kind, _about(layer), list(geometry)
        return torch.ops.dmquant.integer_product(x, layer.qweight, *made)
    return _multiply(_plan_of(layer), x, kind, given, layer.weight_shape[2:], geometry)


def _made(layer: nn.Module) -> list[Tensor]:
    """What `prepare` made, in its order."""
    return [buffer for name, buffer in layer._buffers.items() if name.startswith(PREFIX)]


def _plan_of(layer: nn.Module) -> Plan:
    """The layer's plan, made anew where a tensor that it reads has been put in the place of another."""
    bias = layer.bias
    now = layer.qweight.data_ptr(), layer.kernel_factors.data_ptr(), None if bias is None else bias.data_ptr()
    plan = layer.kernel_plan
    if plan is None or plan[0] != now or (bias is not None and bias.dtype == torch.float16):
        tables, factors, outputs, *kept = _made(layer)
        made = _plan(layer.qweight, tables, factors, outputs, kept, bias, layer.activations.fmt, _about(layer))
        layer.kernel_plan = plan = now, made
    return plan[1]


def _multiply(
    plan: Plan, x: Tensor, kind: str, given: Tensor | None, kernel: Sequence[int], geometry: Sequence[int]
) -> Tensor:
    """The output of a Linear, or with `geometry` (stride, padding, dilation) of a Conv2d, which is channels last.

    Its dtype is that of `x`; `kind` is the granularity of the input's scales, and `given` are static ones.
    """
    wide = x.float() if x.dtype == torch.float16 else x
    single = not geometry or _is_single(kernel, geometry)
    if not single:
        if not wide.is_contiguous(memory_format=torch.channels_last):
            wide = wide.contiguous()
        count = len(given) if given is not None else 1 if kind == "tensor" else len(wide)
        return plan.run_images(wide, kernel, geometry, len(wide) // count, given).to(x.dtype)
    tokens = wide.movedim(1, -1) if geometry else wide
    rows = tokens.reshape(-1, tokens.shape[-1]).contiguous()
    together = 1
    if given is not None or kind != "token":
        together = len(rows) // (len(given) if given is not None else 1 if kind == "tensor" else len(x))
    out = plan.run(rows, together, given).view(*tokens.shape[:-1], -1).to(x.dtype)
    return out.movedim(-1, 1) if geometry else out


@torch.library.custom_op("dmquant::integer_product", mutates_args=())
def _integer_product(
    x: Tensor,
    packed: Tensor,
    made: list[Tensor],
    bias: Tensor | None,
    given: Tensor | None,
    fmt: str,
    kind: str,
    about: list[int],
    geometry: list[int],
) -> Tensor:
    tables, factors, outputs, *kept = made
    plan = _plan(packed, tables, factors, outputs, kept, bias, get_format(fmt), about)
    return _multiply(plan, x, kind, given, about[4:], geometry)


@_integer_product.register_fake
def _like_output(x, packed, made, bias, given, fmt, kind, about, geometry):
    if not geometry:
        return x.new_empty(*x.shape[:-1], about[2])
    return x.new_empty(len(x), *products.output_size(x.shape[2:], about[4:], geometry), about[2]).movedim(-1, 1)


KERNEL = Integer()
