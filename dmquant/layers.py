"""Linear and Conv2d layers whose weights stay packed: codes and scales in memory, dequantized when used.

Both subclass the float layer, so that LoRA adapters, offloading and module filters go on recognising them. Codes and
scales are uint8 Parameters: Parameters are offloaded, and no cast and no loader that casts can change bytes.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from dmquant import kernels
from dmquant.activations import ActivationSpec, TimestepRanges, static_scale
from dmquant.errors import UsageError
from dmquant.kernels.reference import KERNEL
from dmquant.packing import packed_size
from dmquant.qtensor import QuantizedTensor, WeightSpec, check_finite, quantize
from dmquant.scaling import Scales
from dmquant.stores import get_store
from dmquant.transforms import Parts, Storage, alternate, chains
from dmquant.weights import DequantizedWeight

# By name, since the core imports no room above it.
backward, traced = (importlib.import_module(f"dmquant.graphs.{name}") for name in ("backward", "traced"))


class _QuantizedLayer(kernels.Chosen):
    """Packed weight, optional activation quantization, and what both kinds of layer share."""

    channel_dim: int
    """The input's dimension of channels."""
    geometry: tuple[str, ...]
    """Attributes taken from the float layer."""
    multiply: Callable[[Tensor, nn.Module], Tensor]
    reference: Callable[[Tensor, nn.Module], Tensor]
    timestep_ranges: TimestepRanges | None = None  # set by whoever runs the whole model

    @classmethod
    def like(
        cls, layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None, device=None, transforms=()
    ) -> "_QuantizedLayer":
        """An empty quantized layer of the same shape, to be filled by `load_quantized` or from a checkpoint."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name in cls.geometry:
            setattr(self, name, getattr(layer, name))
        self.weight_shape, self._dtype = tuple(layer.weight.shape), layer.weight.dtype
        self.weight_spec, self.activations, self.transforms = spec, activations, transforms

        def empty(shape: tuple[int, int], dtype: torch.dtype) -> nn.Parameter:
            return _as_bytes(torch.empty(shape, dtype=dtype, device=device))

        rows, columns = self.weight_shape[0], sum(spec.segments(self.weight_shape))
        # First, because pipelines ask a module's first parameter for its dtype.
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty(rows, device=device, dtype=self._dtype))
        self.qweight = empty((rows, packed_size(columns, spec.fmt.bits)), torch.uint8)
        self.scale = empty(spec.scale_shape(self.weight_shape), get_store(spec.store).dtype)
        base = spec.base_shape(self.weight_shape)
        self.scale_base = None if base is None else empty(base, torch.float32)
        self.input_scale = None
        if self.is_static:
            channels = self.weight_shape[1] * getattr(layer, "groups", 1)
            self.input_scale = empty(activations.scale_shape(channels), torch.float32)
        for transform in transforms:
            for name, part in transform.parts().items():
                setattr(self, f"{transform.name}_{name}", empty(part.shape, part.dtype))
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and (whole := traced.run(self, x)) is not None:
            return whole
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace takes no packed codes: use torch.compile, or dequantize() the model first"
            )
        if not x.is_floating_point():
            raise TypeError(f"a quantized layer takes floating point, not {x.dtype}: something cast its input")
        *given, x = self.inputs(x)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            y = backward.Product.apply(x, self.bias, self)
        else:
            y = type(self).multiply(x, self)
        return self.complete_output(y, given)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parameters that transforms store."""
        return tuple(f"{transform.name}_{name}" for transform in self.transforms for name in transform.parts())

    def parts(self, transform: Storage) -> Parts:
        """Tensors stored for one of the layer's transforms, in the shapes and dtypes of its `parts`."""
        parts = transform.parts().items()
        return {name: getattr(self, f"{transform.name}_{name}").view(part.dtype) for name, part in parts}

    def load_parts(self, parts: dict[str, Parts]) -> None:
        """Take over tensors of transforms, by transform and part, of the transforms' shapes and dtypes."""
        for method, tensors in parts.items():
            for name, tensor in tensors.items():
                setattr(self, f"{method}_{name}", _as_bytes(tensor))

    @property
    def is_static(self) -> bool:
        """Whether calibration fixed the scales of the input."""
        return self.activations is not None and self.activations.ranges is not None

    def load_quantized(self, weight: QuantizedTensor, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        """Take over codes, scales, bias (out,) and, if given, static input scales, as `load_input_scale` does."""
        self.qweight = _as_bytes(weight.codes)
        self.scale = _as_bytes(weight.scales.stored)
        self.scale_base = None if weight.scales.base is None else _as_bytes(weight.scales.base)
        if input_scale is not None:
            self.load_input_scale(input_scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def load_input_scale(self, input_scale: Tensor) -> None:
        """Take over static input scales, float32 and of the spec's `scale_shape`."""
        self.input_scale = _as_bytes(input_scale)

    @property
    def scales(self) -> Scales:
        spec = self.weight_spec
        stored = self.scale.view(get_store(spec.store).dtype)
        base = None if self.scale_base is None else self.scale_base.view(torch.float32)
        return Scales(stored, base, spec.store)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of `weight` and of new adapters: the float layer's, or the one that `.to` gave the layer since."""
        return self._dtype if self.bias is None else self.bias.dtype

    @property
    def kernel(self) -> str:
        """The kernel that ran last, or, before the first call, the one that would run."""
        return self.kernel_choice[0] if self.kernel_choice else kernels.select(self, self.qweight.device).name

    def _apply(self, fn, recurse: bool = True) -> "_QuantizedLayer":
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that multiplies the quantized input, in `dtype` and the float layer's shape."""
        decode, scale = kernels.select(self, self.qweight.device).dequantize, self.scales.decode()
        return self.complete(decode(self.qweight, scale, self.weight_spec, self.weight_shape, dtype))

    def complete(self, weight: Tensor) -> Tensor:
        """The weight that multiplies the input, from the decoded codes (out, in, ...); same dtype and shape."""
        for transform in self.transforms:
            weight = transform.complete(weight, self.parts(transform))
        return weight

    def float_weight(self) -> Tensor:
        """The float layer's weight as quantized, (out, in, ...) float32, with transforms of the input undone."""
        weight = self.dequantize(torch.float32)
        for transform in reversed(self.transforms):
            weight = transform.undo(weight, self.parts(transform))
        return weight

    @property
    def weight(self) -> DequantizedWeight:
        """The float layer's weight as quantized, in its shape and `dtype`; computed when its data is used."""
        return DequantizedWeight(self._weight_in_dtype, self.weight_shape, self.dtype, self.qweight.device)

    def _weight_in_dtype(self) -> Tensor:
        return self.float_weight().to(self.dtype) if self.transforms else self.dequantize(self.dtype)

    def inputs(self, x: Tensor) -> list[Tensor]:
        """The input that each transform is given, `x` first, then what is quantized; all alike in dtype and shape."""
        given = [x]
        for transform in self.transforms:
            given.append(transform.input(given[-1], self.parts(transform), self.channel_dim))
        return given

    def complete_output(self, y: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Complete the product `y` by the transforms, each from the input that it is given; dtype and shape of `y`."""
        for transform, x in zip(self.transforms, given, strict=True):
            y = transform.add_to(y, self, x, self.parts(transform))
        return y

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantize a transformed input as `activations` says; same dtype and shape."""
        if self.activations is None:
            return x
        scale = None
        if self.is_static:
            fitted, split = self.input_scale.view(torch.float32), self.activations.split
            scale = static_scale(fitted, self.timestep_ranges, x, self.channel_dim, split)
        return kernels.select(self, x.device).fake_quantize(x, self.activations, self.channel_dim, scale)

    def extra_repr(self) -> str:
        spec = self.weight_spec
        split = "" if spec.split is None else f", split={spec.split}"
        transforms = f", transforms={'+'.join(map(str, self.transforms))}" if self.transforms else ""
        return (
            f"{super().extra_repr()}, weights={spec.fmt.name}/{spec.granularity}, "
            f"activations={self.activations or 'none'}{split}{transforms}, kernel={self.kernel}"
        )


class QuantLinear(_QuantizedLayer, nn.Linear):
    """`nn.Linear` with a packed weight. Input (..., in_features); computes in the input's dtype."""

    channel_dim = -1
    geometry = ("in_features", "out_features")
    multiply, reference = staticmethod(kernels.linear), staticmethod(KERNEL.linear)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a quantized input of `shape` from that of the output, in its dtype."""
        return gradient @ self.dequantize(gradient.dtype)


class QuantConv2d(_QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with a packed weight. Input (batch, channels, height, width); computes in the input's dtype."""

    channel_dim = -3
    geometry = (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice")
    multiply, reference = staticmethod(kernels.conv2d), staticmethod(KERNEL.conv2d)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a quantized input of `shape` from that of the output, in its dtype."""
        weight = self.dequantize(gradient.dtype)
        if self.padding_mode == "zeros" and not isinstance(self.padding, str) and len(shape) == 4:
            return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)
        return torch.func.vjp(lambda x: self._conv_forward(x, weight, None), gradient.new_zeros(shape))[1](gradient)[0]

    def __new__(cls, *args, **kwargs):
        # peft makes a convolution's adapter by calling the convolution's own class as it would nn.Conv2d.
        return nn.Conv2d(*args, **kwargs) if args else super().__new__(cls)


_FRAME = vars(nn.Module()).keys()  # hooks, buffers, modules and parameters
QUANTIZED = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}  # by exact class: a subclass may compute something else


def quantize_layer(
    layer: nn.Linear | nn.Conv2d,
    spec: WeightSpec,
    activations: ActivationSpec | None,
    weight: Tensor | None = None,
    input_scale: Tensor | None = None,
    transforms: tuple[Storage, ...] = (),
) -> QuantLinear | QuantConv2d:
    """A quantized layer with fitted scales and nearest codes of `weight`, (out, in, ...), by default the layer's.

    `input_scale`, float32 in the `scale_shape` of `activations`, are static scales fitted by calibration; without them
    static activations are a UsageError, as are weights of NaN or infinity. `transforms` are fitted without data.
    """
    weight = layer.weight if weight is None else weight
    quantized = QUANTIZED[type(layer)].like(layer, spec, activations, "meta", transforms)
    if quantized.is_static and input_scale is None:
        raise UsageError("static activation scales are fitted to calibration data: use `dmquant run` or `quantize`")
    if transforms:
        check_finite(weight)
        parts, weight = next(chains(transforms, weight.detach().float(), None))
        parts, weight = alternate(transforms, parts, weight, lambda left: quantize(left, spec).dequantize())
        quantized.load_parts(parts)
    quantized.load_quantized(quantize(weight, spec), layer.bias, input_scale)
    return quantized.train(layer.training)


def become_(layer: nn.Linear | nn.Conv2d, quantized: QuantLinear | QuantConv2d) -> None:
    """Make `layer` what `quantized` is, in all its places, with its hooks and whatever else was set on it.

    UsageError, before anything changes, for a name set on it that a quantized layer uses.
    """
    more = {name: one for name, one in layer._parameters.items() if name not in ("weight", "bias")}
    added = {*vars(layer), *more, *layer._buffers, *layer._modules} - {*_FRAME, *quantized.geometry}
    taken = added and sorted(added & {*vars(quantized), *quantized._parameters, *dir(quantized)} - {*dir(type(layer))})
    if taken:
        raise UsageError(f"a quantized layer uses the name '{taken[0]}', which was set on it: take another name")
    layer.__class__ = type(quantized)
    vars(layer).pop("forward", None)  # what a hook leaves behind that was removed: the float layer's
    own = {name: value for name, value in vars(quantized).items() if name not in _FRAME}
    vars(layer).update(own, _parameters=quantized._parameters | more)


def _as_bytes(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous().view(torch.uint8), requires_grad=False)
