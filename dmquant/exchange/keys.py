"""Names of weights in the layouts that models were first published in, which ComfyUI and GGUF readers expect.

Inverse to the conversions of diffusers' single-file loaders (diffusers/loaders/single_file_utils.py): Stable Diffusion
1.x, 2.x and XL (`input_blocks...`), Stable Diffusion 3 (`joint_blocks...`) and Flux.1 (`double_blocks...`). Some layers
of diffusers are one layer there: queries, keys and values are rows of `qkv`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmquant.exchange.source import Source

_LDM = "model.diffusion_model."


@dataclass(frozen=True)
class Target:
    """A parameter of the original layout, and the parameters of diffusers' model that are its rows, in order."""

    name: str
    sources: tuple[str, ...]
    swapped: bool = False
    """The original has shift before scale: its halves are diffusers' in the other order."""

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """The original's rows from those of its sources, each (rows, ...) of one dtype that can be concatenated."""
        return self.in_order(parts[0] if len(parts) == 1 else torch.cat(list(parts)))

    def in_order(self, rows: Tensor) -> Tensor:
        """The original's rows from those of all sources, one after another; same shape and dtype."""
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows


def original(class_name: str, config: Mapping[str, Any], names: Iterable[str]) -> list[Target] | None:
    """Parameters of the original layout that those of diffusers' backbone of this class make, by name and `config`.

    None where no such layout is known: for a class without one, and for a backbone with parts that it has no name for.
    """
    if class_name not in _PLACES:
        return None
    prefix, place_of = _PLACES[class_name]
    found: dict[str, list[tuple[int, str]]] = {}
    swapped = set()
    for name in names:
        if (place := place_of(name, config)) is None:
            return None
        target, _, index = place.removeprefix(_SWAPPED).partition(_ROWS)
        parameter = name.rpartition(".")[2]
        target = prefix + (target if target.endswith((".scale", "pos_embed")) else f"{target}.{parameter}")
        found.setdefault(target, []).append((int(index or 0), name))
        if place.startswith(_SWAPPED):
            swapped.add(target)
    return [
        Target(target, tuple(name for _, name in sorted(rows)), target in swapped) for target, rows in found.items()
    ]


def targets_of(source: Source) -> tuple[list[Target], bool]:
    """A saved backbone's parameters in the original layout, and whether that is known; else they keep their names."""
    names = [f"{name}.weight" for name in source.layers]
    names += [f"{name}.bias" for name, layer in source.layers.items() if layer.bias is not None]
    names += source.rest
    targets = original(type(source.backbone).__name__, source.config, names)
    return ([Target(name, (name,)) for name in names], False) if targets is None else (targets, True)


_ROWS, _SWAPPED = "/", "~"  # `qkv/1`: the second of the layers that are rows of qkv; `~`: halves swapped


def _embedder(ours: str, theirs: str, first: str, second: str) -> dict[str, str]:
    return {f"{ours}.linear_1": f"{theirs}.{first}", f"{ours}.linear_2": f"{theirs}.{second}"}


def _rows(ours: str, names: Sequence[str], theirs: str) -> dict[str, str]:
    return {f"{ours}{name}": f"{theirs}{_ROWS}{index}" for index, name in enumerate(names)}


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX = {
    **_embedder("time_text_embed.timestep_embedder", "time_in", "in_layer", "out_layer"),
    **_embedder("time_text_embed.text_embedder", "vector_in", "in_layer", "out_layer"),
    **_embedder("time_text_embed.guidance_embedder", "guidance_in", "in_layer", "out_layer"),
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": f"{_SWAPPED}final_layer.adaLN_modulation.1",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    **_rows("attn.", _QKV, "img_attn.qkv"),
    **_rows("attn.", _ADDED, "txt_attn.qkv"),
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    **_rows("", [*(f"attn.{name}" for name in _QKV), "proj_mlp"], "linear1"),
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    **_embedder("time_text_embed.timestep_embedder", "t_embedder", "mlp.0", "mlp.2"),
    **_embedder("time_text_embed.text_embedder", "y_embedder", "mlp.0", "mlp.2"),
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": f"{_SWAPPED}final_layer.adaLN_modulation.1",
}
_SD3_BLOCK = {
    **_rows("attn.", _QKV, "x_block.attn.qkv"),
    **_rows("attn.", _ADDED, "context_block.attn.qkv"),
    **_rows("attn2.", _QKV, "x_block.attn2.qkv"),
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_UNET = {
    **_embedder("time_embedding", "time_embed", "0", "2"),
    **_embedder("add_embedding", "label_emb", "0.0", "0.2"),
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


_IN_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.(.+)")


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    return table.get(name) or table.get(name.rpartition(".")[0])


def _in_blocks(lists: Mapping[str, tuple[str, Mapping[str, str]]], table: Mapping[str, str], name: str) -> str | None:
    """The place of a parameter in a transformer with these lists of blocks, by name, beside what `table` holds."""
    kind, _, rest = name.partition(".")
    if kind not in lists:
        return _look_up(table, name)
    index, _, inside = rest.partition(".")
    theirs, of_block = lists[kind]
    place = _look_up(of_block, inside)
    return place and f"{theirs}.{index}.{place}"


def _flux(name: str, config: Mapping[str, Any]) -> str | None:
    lists = {
        "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
    }
    return _in_blocks(lists, _FLUX, name)


def _sd3(name: str, config: Mapping[str, Any]) -> str | None:
    place = _in_blocks({"transformer_blocks": ("joint_blocks", _SD3_BLOCK)}, _SD3, name)
    last = (
        f"transformer_blocks.{config['num_layers'] - 1}.norm1_context."  # of the type of norm_out: no attention follows
    )
    return f"{_SWAPPED}{place}" if place and name.startswith(last) else place


def _unet(name: str, config: Mapping[str, Any]) -> str | None:
    """Levels of resnets, each with a transformer beside it or none, are one list of blocks on the way down, one up."""
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        return None
    if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = middle.groups()
        return _in_unet_block(f"middle_block.{2 * int(index) + (kind == 'attentions')}", kind, rest)
    if not (
        found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.(.+)", name)
    ):
        return _look_up(_UNET, name)
    way, level, kind, index, rest = found.groups()
    first = int(level) * (layers + 1) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op" if rest.startswith("conv.") else None
    if kind == "upsamplers":
        transformers = "CrossAttn" in config["up_block_types"][int(level)]
        return f"output_blocks.{first + layers}.{1 + transformers}.conv" if rest.startswith("conv.") else None
    block = f"input_blocks.{first + 1}" if way == "down" else f"output_blocks.{first}"
    return _in_unet_block(f"{block}.{int(kind == 'attentions')}", kind, rest)


def _in_unet_block(block: str, kind: str, rest: str) -> str | None:
    inside = _look_up(_RESNET, rest) if kind == "resnets" else rest.rpartition(".")[0]
    return inside and f"{block}.{inside}"


_PLACES = {
    "FluxTransformer2DModel": ("", _flux),
    "SD3Transformer2DModel": (_LDM, _sd3),
    "UNet2DConditionModel": (_LDM, _unet),
}
"""By class of diffusers' backbone: what all names begin with, and where a parameter has its place."""
