"""Pairs of layers with nothing but a linear function between them: range can move from one to the other.

In diffusers' blocks: to_v -> to_out (attention is linear in its values), the value half of a gated feed-forward -> its
output, and an affine LayerNorm -> the layers that read it.
"""

from collections.abc import Iterator

from torch import nn

from dmquant.transforms.pair import Pair, finds_pairs

_ATTENTION = ("Attention", "FluxAttention", "Flux2Attention")  # classes that send values to to_out and nowhere else
_GATED = ("GEGLU", "SwiGLU")  # classes that give value * f(gate), value first


@finds_pairs
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


@finds_pairs
def _attention(block: nn.Module) -> Iterator[Pair]:
    """to_v -> to_out.0; in joint attention together with the same layers of the other stream."""
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


@finds_pairs
def _feed_forward(block: nn.Module) -> Iterator[Pair]:
    """The value half of net.0.proj -> net.2."""
    if type(block).__name__ == "FeedForward" and type(block.net[0]).__name__ in _GATED:
        proj = block.net[0].proj
        yield Pair((proj,), (block.net[2],), len(proj.weight) // 2)
