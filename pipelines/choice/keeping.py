"""Which layers to leave in high precision: proposed by what they cost, beside what the family and others leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmquant.matching import Matcher
from dmquant.pipelines.choice.record import Study

SHARE = 0.02
"""Of all weights that a proposed list holds at most: in 16 bit these add some 0.25 bits a weight."""
ELSEWHERE: Mapping[str, Sequence[tuple[str, tuple[str, ...]]]] = {
    "flux2": [
        (
            "convert_to_quant",
            (
                "*stream_modulation*",
                "time_guidance_embed.*",
                "x_embedder",
                "context_embedder",
                "norm_out.*",
                "proj_out",
            ),
        )
    ],
    "zimage": [
        (
            "convert_to_quant",
            ("all_x_embedder*", "all_final_layer*", "cap_embedder.1", "*adaLN_modulation*", "t_embedder*"),
        )
    ],
    "qwenimage": [
        (
            "ComfyUI",
            ("time_text_embed.*", "img_in", "txt_in", "norm_out.*", "proj_out", "transformer_blocks.0.img_mod.1"),
        ),
        ("mflux", ("*.img_mod.1",)),
        ("LENS", ("*.img_mod.1", "*.txt_mod.1")),
    ],
    "chroma": [("convert_to_quant", ("distilled_guidance_layer.*", "proj_out", "x_embedder", "context_embedder"))],
    "ideogram4": [("convert_to_quant", ("*embed*", "*adaln_proj*", "final_layer*"))],
    "wan": [("ComfyUI", ("condition_embedder.*", "proj_out"))],
}
"""Layers that other tools leave, by family, as globs on diffusers' names: what their sources named in August 2026."""


@dataclass(frozen=True)
class KeepList:
    """Layers that somebody leaves in high precision, with their shares of all weights and of all error."""

    who: str
    layers: tuple[str, ...]
    weights: float
    error: float


def keep_lists(study: Study, family: str) -> list[KeepList]:
    """The list that costs propose, the recipe's own, and those of others for the family."""
    own = [name for name, layer in study.layers.items() if layer.kept is not None]
    lists = [_list(study, "proposed here", proposed(study)), _list(study, "this recipe", own)]
    for who, globs in ELSEWHERE.get(family, ()):
        matcher = Matcher([list(globs)])
        lists.append(_list(study, who, [name for name in study.layers if list(matcher.matching(name))]))
    return lists


def proposed(study: Study) -> list[str]:
    """The layers of most cost for their size, as many as hold SHARE of all weights, in the order of the model.

    Only those that cost more for their size than the whole model does on average.
    """
    weights = sum(layer.weights for layer in study.layers.values())
    cost = sum(layer.cost for layer in study.layers.values())
    dense = sorted(study.layers, key=lambda name: -study.layers[name].cost / study.layers[name].weights)
    left, chosen = SHARE * weights, set()
    for name in dense:
        layer = study.layers[name]
        if layer.cost / layer.weights <= cost / weights:
            break
        if layer.weights <= left:
            left -= layer.weights
            chosen.add(name)
    return [name for name in study.layers if name in chosen]


def _list(study: Study, who: str, names: Sequence[str]) -> KeepList:
    layers = [study.layers[name] for name in names]
    weights = sum(layer.weights for layer in study.layers.values())
    cost = sum(layer.cost for layer in study.layers.values()) or 1.0
    shares = sum(layer.weights for layer in layers) / weights, sum(layer.cost for layer in layers) / cost
    return KeepList(who, tuple(names), *shares)
