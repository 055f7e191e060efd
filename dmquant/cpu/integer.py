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
from dmquant.cpu.compiling import missing_compiler
from dmquant.cpu.products import Codes, Operand, Places
from dmquant.formats import Format, get_format
from dmquant.kernels import weights_kept
from dmquant.kernels.reference import Reference
from dmquant.operands import integer_weight, unit_of
from dmquant.scaling import fit_absmax


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
        try:
            largest = integer_weight(layer).largest
        except ValueError as error:
            return str(error)
        fmt = layer.activations.fmt
        if products.compiled() and largest > (most := products.largest_weight(fmt, products.level())):
            level = products.LEVELS[products.level()]
            return f"integers up to {largest} times inputs in {fmt.name}: {level} is exact up to {most}"
        return None

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = integer_weight(layer)
        made = {
            "tables": weight.tables(),
            "shifts": weight.shifts,
            "outputs": weight.scale * unit_of(layer.activations.fmt),
            "largest": torch.tensor(weight.largest),
        }
        if weights_kept() == "speed":
            halves = _halves(layer.qweight, made["tables"], made["shifts"], weight.largest, _about(layer))
            for index, half in enumerate(halves):
                made[f"panels{index}"], made[f"sums{index}"] = half.expanded()
        return made

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        return _run(x, layer, ()) if _takes(x) else super().linear(x, layer)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not _takes(x):
            return super().conv2d(x, layer)
        geometry = *layer.stride, *layer.padding, *layer.dilation
        return _run(x, layer, geometry) if x.ndim == 4 else _run(x.unsqueeze(0), layer, geometry).squeeze(0)


def _takes(x: Tensor) -> bool:
    """Whether this call is for integers: no gradient goes through it, and it has tokens in a common dtype."""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0
    return fits and not (torch.is_grad_enabled() and x.requires_grad) and not torch.is_autocast_enabled("cpu")


def _input_refused(spec: ActivationSpec | None) -> str | None:
    """Why inputs quantized so are no operands of one exact product; None where they are."""
    if spec is None:
        return "its inputs are not quantized"
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
    """What `_halves` needs to know of a weight: bits, size of a group, split, shape."""
    spec = layer.weight_spec
    return [spec.fmt.bits, spec.granularity.size or products.WHOLE, spec.split or 0, *layer.weight_shape]


def _halves(qweight: Tensor, tables: Tensor, shifts: Tensor, largest: int, about: Sequence[int]) -> list[Operand]:
    """The weight as an operand, or those of the two halves of the input's channels."""
    bits, size, split, _, channels, *kernel = about
    positions, halves, byte, group = math.prod(kernel), [], 0, 0
    for part in (split, channels - split) if split else (channels,):
        codes, octaves = (qweight[:, byte:], shifts[:, group:]) if byte else (qweight, shifts)
        halves.append(Operand(codes, bits, tables, octaves, size, positions, part, largest))
        byte, group = byte + part * positions * bits // 8, group + -(-part * positions // size)
    return halves


def _run(x: Tensor, layer: nn.Module, geometry: Sequence[int]) -> Tensor:
    spec, given = layer.activations, None
    if spec.ranges is not None:
        fitted = layer.input_scale.view(torch.float32)
        given = static_scale(fitted, layer.timestep_ranges, x, layer.channel_dim).flatten()
    kept = [buffer for name, buffer in layer._buffers.items() if name.startswith(("kernel_panels", "kernel_sums"))]
    multiply = torch.ops.dmquant.integer_product if torch.compiler.is_compiling() else _multiply
    return multiply(
        *(x, layer.qweight, layer.kernel_tables, layer.kernel_shifts, layer.kernel_outputs, layer.kernel_largest),
        *(kept, layer.bias, given, spec.fmt.name, spec.granularity.kind, _about(layer), list(geometry)),
    )


def _multiply(
    x: Tensor,
    qweight: Tensor,
    tables: Tensor,
    shifts: Tensor,
    outputs: Tensor,
    largest: Tensor,
    kept: list[Tensor],
    bias: Tensor | None,
    given: Tensor | None,
    fmt: str,
    kind: str,
    about: list[int],
    geometry: list[int],
) -> Tensor:
    """The output of a Linear, or with `geometry` (stride, padding, dilation) of a Conv2d, in the dtype of `x`."""
    halves, rounded_to = _halves(qweight, tables, shifts, largest.item(), about), get_format(fmt)
    wide = x if x.dtype != torch.float16 else x.float()
    images = geometry and not _is_single(about[5:], geometry)
    if geometry and not images:
        wide = wide.movedim(1, -1)
    shape = _output_shape(wide, about, geometry if images else ())
    single = len(halves) == 1
    out = torch.empty(shape, dtype=wide.dtype if single else torch.float32)
    matrix = out.view(-1, shape[-1])
    bias = None if bias is None else bias.detach().float()
    first = 0
    for index, half in enumerate(halves):
        channels = wide if single else wide.narrow(1 if images else -1, first, half.columns)
        if images:
            codes, places = _of_images(channels, rounded_to, kind, given, about[5:], geometry)
        else:
            codes = _of_tokens(channels, rounded_to, kind, given)
            places = Places(codes.codes.shape[1])
        expanded = (kept[2 * index], kept[2 * index + 1]) if kept else None
        of_outputs = outputs[index]
        products.multiply(codes, places, half, of_outputs, None if index else bias, matrix, expanded, adds=index > 0)
        first += half.columns
    out = out.to(x.dtype)
    return out.movedim(-1, 1) if geometry else out


def _of_tokens(x: Tensor, fmt: Format, kind: str, given: Tensor | None) -> Codes:
    """Codes of `x` (rows of the batch, ..., channels), a token each; `given` are static scales."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if given is None and kind != "token":
        given = _scales(x, fmt, kind)
    if given is not None:
        given = given.repeat_interleave(len(tokens) // len(given))
    return products.round_tokens(tokens, fmt, given)


def _of_images(
    x: Tensor, fmt: Format, kind: str, given: Tensor | None, kernel: Sequence[int], geometry: Sequence[int]
) -> tuple[Codes, Places]:
    """Codes of `x` (batch, channels, height, width) within their padding, and where each output pixel's lie."""
    down, right, *padding, step_down, step_right = geometry
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    if given is None and kind == "tensor":
        given = _scales(x, fmt, kind)
    if given is not None:
        given = given.repeat_interleave(len(x) // len(given))
    codes = products.round_images(x, fmt, padding, given)
    _, high, wide, pixel = codes.codes.shape
    line = wide * pixel
    segments = [y * step_down * line + i * step_right * pixel for y in range(kernel[0]) for i in range(kernel[1])]
    height, width = _output_size(x.shape[2:], kernel, geometry)
    return codes, Places(high * line, down * line, right * pixel, height, width, tuple(segments))


def _scales(x: Tensor, fmt: Format, kind: str) -> Tensor:
    """Online scales, float32, of each row of the batch, or one of all of `x`."""
    return fit_absmax(x.reshape(len(x) if kind == "image" else 1, 1, -1).float(), fmt, "fp32").decode().flatten()


def _output_size(size: Sequence[int], kernel: Sequence[int], geometry: Sequence[int]) -> tuple[int, int]:
    high, wide = (
        (size[i] + 2 * geometry[2 + i] - geometry[4 + i] * (kernel[i] - 1) - 1) // geometry[i] + 1 for i in (0, 1)
    )
    return high, wide


def _output_shape(x: Tensor, about: Sequence[int], geometry: Sequence[int]) -> tuple[int, ...]:
    """Shape of the output, outputs last, of tokens (..., channels), or with `geometry` of images."""
    if geometry:
        return len(x), *_output_size(x.shape[2:], about[5:], geometry), about[3]
    return *x.shape[:-1], about[3]


integer_product = torch.library.custom_op("dmquant::integer_product", _multiply, mutates_args=())


@integer_product.register_fake
def _like_output(x, qweight, tables, shifts, outputs, largest, kept, bias, given, fmt, kind, about, geometry):
    pixels = bool(geometry) and _is_single(about[5:], geometry)
    shape = _output_shape(x.movedim(1, -1) if pixels else x, about, () if pixels else geometry)
    out = x.new_empty(shape)
    return out.movedim(-1, 1) if geometry else out


KERNEL = Integer()
