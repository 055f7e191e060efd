"""Linear and Conv2d layers whose weights stay packed: codes and scales in memory, dequantized when used.

Both subclass the float layer, so that LoRA adapters, offloading and module filters go on recognising them. Codes and
scales are uint8 Parameters: as Parameters they are offloaded, and as bytes no `.to(dtype)`, and no loader that casts
floating-point tensors, can change them.
"""

import torch
from torch import Tensor, nn

from dmquant import kernels
from dmquant.activations import ActivationSpec, TimestepRanges, static_scale
from dmquant.errors import UsageError
from dmquant.packing import packed_size
from dmquant.qtensor import QuantizedTensor, WeightSpec, check_finite, quantize
from dmquant.scaling import Scales
from dmquant.stores import get_store
from dmquant.transforms import Parts, Storage, alternate, chains
from dmquant.weights import DequantizedWeight


class _QuantizedLayer(kernels.Chosen):
    """Packed weight, optional activation quantization, and what both kinds of layer share."""

    channel_dim: int  # of the input
    timestep_ranges: TimestepRanges | None  # set by `share_timesteps`

    def _setup(
        self,
        shape: tuple[int, ...],
        channels: int,
        bias: bool,
        spec: WeightSpec,
        activations,
        transforms,
        device,
        dtype,
    ) -> None:
        self.weight_shape, self.weight_spec, self.activations, self.transforms = shape, spec, activations, transforms
        rows, columns = shape[0], sum(spec.segments(shape))
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        self.qweight = _bytes_parameter((rows, packed_size(columns, spec.fmt.bits)), torch.uint8, device)
        self.scale = _bytes_parameter(spec.scale_shape(shape), get_store(spec.store).dtype, device)
        base = spec.base_shape(shape)
        self.scale_base = None if base is None else _bytes_parameter(base, torch.float32, device)
        self.input_scale, self.timestep_ranges = None, None
        if self.is_static:
            self.input_scale = _bytes_parameter(activations.scale_shape(channels), torch.float32, device)
        for transform in transforms:
            for name, part in transform.parts().items():
                setattr(self, f"{transform.name}_{name}", _bytes_parameter(part.shape, part.dtype, device))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parameters that transforms store."""
        return tuple(f"{transform.name}_{name}" for transform in self.transforms for name in transform.parts())

    def parts(self, transform: Storage) -> Parts:
        """What one of its transforms stored, in its dtypes."""
        stored = {name: getattr(self, f"{transform.name}_{name}") for name in transform.parts()}
        return {name: stored[name].view(part.dtype) for name, part in transform.parts().items()}

    def load_parts(self, parts: dict[str, Parts]) -> None:
        """Take over parts of transforms, by the name of the transform and of the part."""
        for method, tensors in parts.items():
            for name, tensor in tensors.items():
                setattr(self, f"{method}_{name}", _as_bytes(tensor))

    @property
    def timestep_counts(self) -> set[int]:
        """The numbers of timestep ranges that what it computes differs by."""
        own = self.activations.ranges if self.is_static else 1
        return {own, *(transform.timestep_ranges for transform in self.transforms)} - {1}

    @property
    def is_static(self) -> bool:
        """Whether calibration fixed the scales of the input."""
        return self.activations is not None and self.activations.ranges is not None

    def load_quantized(self, weight: QuantizedTensor, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        """Take over codes, scales and bias, and if given static input scales: float32, in the spec's `scale_shape`."""
        self.qweight = _as_bytes(weight.codes)
        self.scale = _as_bytes(weight.scales.stored)
        self.scale_base = None if weight.scales.base is None else _as_bytes(weight.scales.base)
        if input_scale is not None:
            self.input_scale = _as_bytes(input_scale)
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
        """What `weight` and new adapters are in: the dtype of the float layer, and whatever `.to` made of it since."""
        return self._dtype if self.bias is None else self.bias.dtype

    @property
    def kernel(self) -> str:
        """The kernel that ran last, or, before the first call, the one that would run."""
        return self.kernel_choice.kernel if self.kernel_choice else kernels.select(self, self.qweight.device).name

    def _apply(self, fn, recurse: bool = True) -> "_QuantizedLayer":
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that the input meets, in `dtype` and the float layer's shape."""
        kernel = kernels.select(self, self.qweight.device)
        weight = kernel.dequantize(self.qweight, self.scales.decode(), self.weight_spec, self.weight_shape, dtype)
        return self.complete(weight)

    def complete(self, weight: Tensor) -> Tensor:
        """The weight that the input meets, from what the codes stand for."""
        for transform in self.transforms:
            weight = transform.complete(weight, self.parts(transform))
        return weight

    def float_weight(self) -> Tensor:
        """What stands for the float layer's weight, in float32: transforms of the input are undone."""
        weight = self.dequantize(torch.float32)
        for transform in reversed(self.transforms):
            weight = transform.undo(weight, self.parts(transform))
        return weight

    @property
    def weight(self) -> DequantizedWeight:
        """What stands for the float layer's weight, in its shape and `dtype`; computed when its data is asked for."""
        return DequantizedWeight(self._weight_in_dtype, self.weight_shape, self.dtype, self.qweight.device)

    def _weight_in_dtype(self) -> Tensor:
        return self.float_weight().to(self.dtype) if self.transforms else self.dequantize(self.dtype)

    def transform_input(self, x: Tensor) -> Tensor:
        """`x` before it is quantized: changed as the transforms say, same dtype and shape."""
        for transform in self.transforms:
            x = transform.input(x, self.parts(transform), self.channel_dim)
        return x

    def complete_output(self, y: Tensor, x: Tensor) -> Tensor:
        """The output, from what the weight gave and the transformed input."""
        for transform in self.transforms:
            y = transform.add_to(y, self, x, self.parts(transform))
        return y

    def quantize_input(self, x: Tensor) -> Tensor:
        """A transformed input as the weight meets it: rounded as `activations` says, same dtype and shape."""
        if self.activations is None:
            return x
        scale = None
        if self.is_static:
            fitted, split = self.input_scale.view(torch.float32), self.activations.split
            scale = static_scale(fitted, self.timestep_ranges, x, self.channel_dim, split)
        return kernels.select(self, x.device).fake_quantize(x, self.activations, self.channel_dim, scale)

    def _specs_repr(self) -> str:
        spec = self.weight_spec
        split = "" if spec.split is None else f", split={spec.split}"
        transforms = f", transforms={'+'.join(map(str, self.transforms))}" if self.transforms else ""
        return (
            f", weights={spec.fmt.name}/{spec.granularity}, activations={self.activations or 'none'}{split}{transforms}"
            f", kernel={self.kernel}"
        )


class QuantLinear(_QuantizedLayer, nn.Linear):
    """`nn.Linear` with a packed weight. Input (..., in_features); computes in the input's dtype."""

    channel_dim = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: WeightSpec,
        activations: ActivationSpec | None = None,
        device=None,
        dtype: torch.dtype | None = None,
        transforms: tuple[Storage, ...] = (),
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._setup((out_features, in_features), in_features, bias, spec, activations, transforms, device, dtype)

    @classmethod
    def like(
        cls,
        layer: nn.Linear,
        spec: WeightSpec,
        activations: ActivationSpec | None,
        device=None,
        transforms: tuple[Storage, ...] = (),
    ) -> "QuantLinear":
        """An empty quantized layer of the same shape, to be filled by `load_quantized` or from a checkpoint."""
        biased, dtype = layer.bias is not None, layer.weight.dtype
        return cls(layer.in_features, layer.out_features, biased, spec, activations, device, dtype, transforms)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transform_input(x)
        return self.complete_output(kernels.linear(x, self), x)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self) + self._specs_repr()


class QuantConv2d(_QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with a packed weight. Input (batch, channels, height, width); computes in the input's dtype."""

    channel_dim = -3

    def __new__(cls, *args, spec: WeightSpec | None = None, **kwargs):
        # peft makes a convolution's adapter by calling the convolution's own class as it would nn.Conv2d.
        if args and spec is None:
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        bias: bool,
        spec: WeightSpec,
        activations: ActivationSpec | None = None,
        device=None,
        dtype: torch.dtype | None = None,
        transforms: tuple[Storage, ...] = (),
        **geometry,
    ):
        # The float layer works out paddings and checks arguments; made on meta, it costs no memory.
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, bias=bias, device="meta", **geometry)
        del self._parameters["weight"]
        shape = (out_channels, in_channels // self.groups, *self.kernel_size)
        self._setup(shape, in_channels, bias, spec, activations, transforms, device, dtype)

    @classmethod
    def like(
        cls,
        layer: nn.Conv2d,
        spec: WeightSpec,
        activations: ActivationSpec | None,
        device=None,
        transforms: tuple[Storage, ...] = (),
    ) -> "QuantConv2d":
        """An empty quantized layer of the same shape, to be filled by `load_quantized` or from a checkpoint."""
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            bias=layer.bias is not None,
            spec=spec,
            activations=activations,
            device=device,
            dtype=layer.weight.dtype,
            transforms=transforms,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.transform_input(x)
        return self.complete_output(kernels.conv2d(x, self), x)

    def extra_repr(self) -> str:
        return nn.Conv2d.extra_repr(self) + self._specs_repr()


QUANTIZED = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}  # by exact class: a subclass may compute something else


def quantize_layer(
    layer: nn.Linear | nn.Conv2d,
    spec: WeightSpec,
    activations: ActivationSpec | None,
    weight: Tensor | None = None,
    input_scale: Tensor | None = None,
    transforms: tuple[Storage, ...] = (),
) -> QuantLinear | QuantConv2d:
    """A quantized layer with the scales and nearest codes of `weight` (default: the layer's own).

    `input_scale` is what calibration fitted for static activations (calib.ranges); without it they are a UsageError.
    `transforms` are fitted without data.
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


def share_timesteps(module: nn.Module) -> TimestepRanges | None:
    """One `TimestepRanges` for the layers of `module` that differ by timestep; None where there are none."""
    layers = [layer for layer in module.modules() if isinstance(layer, _QuantizedLayer) and layer.timestep_counts]
    if not layers:
        return None
    shared = TimestepRanges(count for layer in layers for count in layer.timestep_counts)
    for layer in layers:
        layer.timestep_ranges = shared
    return shared


def _bytes_parameter(shape: tuple[int, int], dtype: torch.dtype, device) -> nn.Parameter:
    rows, columns = shape
    return nn.Parameter(
        torch.empty(rows, columns * dtype.itemsize, dtype=torch.uint8, device=device), requires_grad=False
    )


def _as_bytes(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous().view(torch.uint8), requires_grad=False)
