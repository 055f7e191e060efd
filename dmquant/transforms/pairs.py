"""Pairs of layers with nothing but a linear function between them: range can move from one to the other.

In diffusers' blocks: to_v -> to_out (attention is linear in its values), the value half of a gated feed-forward -> its
output, and an affine LayerNorm -> the layers that read it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ATTENTION = ("Attention", "FluxAttention")  # classes that send values to to_out and nowhere else
_GATED = ("GEGLU", "SwiGLU")  # classes that give value * f(gate), value first


@dataclass(frozen=True)
class Pair:
    """`firsts` give channels that only `seconds` read; of the output of a first one, `channels` from the beginning."""

    firsts: tuple[nn.Module, ...]
    seconds: tuple[nn.Linear, ...]
    channels: int

    @property
    def needs_powers_of_two(self) -> bool:
        """Whether other factors would round weights: in 16 bits, not in float32."""
        return self.seconds[0].weight.dtype.itemsize < 4

    def allowed(self, factor: Tensor) -> Tensor:
        """`factor` as it is, or each at the nearest power of two; same shape and dtype."""
        return factor.float().log2().round().exp2().to(factor.dtype) if self.needs_powers_of_two else factor

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply each of the channels by a factor in the firsts and divide it out of the seconds' weights, in place.

        `factor` is float32 (channels,). The function stays: to rounding, or with powers of two to the bit.
        """
        for layer in self.firsts:
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    part = parameter[: self.channels]
                    part.mul_(factor.view(-1, *[1] * (part.ndim - 1)).to(part.dtype))
        for layer in self.seconds:
            layer.weight.div_(factor.to(layer.weight.dtype))


def pairs(module: nn.Module) -> Iterator[Pair]:
    """The pairs of a backbone, found by the structure of diffusers' blocks; norms first."""
    for finder in (_after_norms, _attention, _feed_forward):
        for block in module.modules():
            yield from (pair for pair in finder(block) if _fits(pair))


def _fits(pair: Pair) -> bool:
    """Whether all layers are plain and of fitting size."""
    firsts = all(type(one) in (nn.Linear, nn.LayerNorm) and len(one.weight) >= pair.channels for one in pair.firsts)
    return firsts and all(type(one) is nn.Linear and one.in_features == pair.channels for one in pair.seconds)


def _attention(block: nn.Module) -> Iterator[Pair]:
    """to_v -> to_out.0; of joint attention together with those of the other stream."""
    if type(block).__name__ not in _ATTENTION or getattr(block, "to_out", None) is None:
        return
    if isinstance(block.processor, nn.Module):  # an adapter's, with values of its own
        return
    firsts = (block.to_v, getattr(block, "add_v_proj", None))
    seconds = (block.to_out[0], getattr(block, "to_add_out", None))
    if isinstance(block.to_v, nn.Linear):
        yield Pair(
            *(tuple(one for one in side if one is not None) for side in (firsts, seconds)), len(block.to_v.weight)
        )


def _feed_forward(block: nn.Module) -> Iterator[Pair]:
    """The value half of net.0.proj -> net.2."""
    if type(block).__name__ == "FeedForward" and type(block.net[0]).__name__ in _GATED:
        proj = block.net[0].proj
        yield Pair((proj,), (block.net[2],), len(proj.weight) // 2)


def _after_norms(block: nn.Module) -> Iterator[Pair]:
    """norm1, norm2 and norm3 of a UNet's transformer block -> what reads them, where nothing is added in between."""
    if (
        type(block).__name__ != "BasicTransformerBlock"
        or block.norm_type != "layer_norm"
        or block.pos_embed is not None
    ):
        return
    self_attention = block.attn1
    readers = [(block.norm1, (self_attention.to_q, self_attention.to_k, self_attention.to_v))]
    if block.only_cross_attention:
        readers = [(block.norm1, (self_attention.to_q,))]
    if block.attn2 is not None and block.attn2.is_cross_attention:
        readers.append((block.norm2, (block.attn2.to_q,)))
    readers.append((block.norm3, (block.ff.net[0].proj,)))
    for norm, seconds in readers:
        if norm.weight is not None:
            yield Pair((norm,), seconds, len(norm.weight))
