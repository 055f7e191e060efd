"""Make once what layers share while a block is run over the samples."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence

from torch import Tensor, nn

from dmquant.calib.layers.learner import Learner
from dmquant.layers import QuantConv2d, QuantLinear


class Latest:
    """What was made last of an input: queries, keys and values are made of one, one after another."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Tensor, int, Tensor]] = {}

    def of(self, kind: Hashable, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(x)`, or what it gave if the last tensor of this kind was `x`, and nothing was written into it since."""
        given, version, made = self._made.get(kind, (None, 0, x))
        if given is not x or version != x._version:
            made = make(x)
            self._made[kind] = x, x._version, made
        return made


def kind_of_input(layer: QuantLinear | QuantConv2d, name: Hashable) -> Hashable:
    """The same for linear layers that make the same of an input; otherwise `name`."""
    is_plain = isinstance(layer, QuantLinear) and not layer.transforms and not layer.is_static
    return layer.activations if is_plain else name


@contextlib.contextmanager
def sharing_inputs(layers: Sequence[nn.Module | Learner]) -> Iterator[None]:
    """Until the block ends, let layers that quantize one input alike do it once."""
    latest = Latest()
    try:
        for number, layer in enumerate(layers):
            quantized = layer.quantized if isinstance(layer, Learner) else layer
            kind, quantize = kind_of_input(quantized, number), layer.quantize_input
            layer.quantize_input = lambda x, kind=kind, quantize=quantize: latest.of(kind, x, quantize)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("quantize_input", None)
