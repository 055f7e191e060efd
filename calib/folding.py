"""Fold the smoothing of layers into those before them: no factor is stored then, and nothing multiplied at run time.

Possible where only a linear function lies between two layers (transforms/pairs.py). It is done to the float layers of a
block before anything else is computed with them, so that targets, scales and roundings are those of the folded block,
which is the same function.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dmquant.calib.transforming import output_error
from dmquant.convert import LayerPlan
from dmquant.layers import QuantLinear
from dmquant.transforms import InputStatistics, Transform, chains
from dmquant.transforms.pairs import Pair, pairs


@dataclass(frozen=True)
class Fold:
    """A pair of layers whose second ones, by name, leave their smoothing to the first ones."""

    pair: Pair
    readers: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of its factor among a block's tensors on disk."""
        return f"{self.readers[0]}.folded"

    def apply_(self, factor: Tensor, plans: dict[str, LayerPlan]) -> None:
        """Change the float layers and take the smoothing out of the readers' plans; `factor`: float32 (channels,)."""
        self.pair.scale_(factor)
        for name in self.readers:
            plans[name] = replace(plans[name], transforms=_others(plans[name]))


def folds_of(backbone: nn.Module, block: str, plans: Mapping[str, LayerPlan]) -> list[Fold]:
    """What smoothing in the module `block` can be folded: where all readers of a layer have it, with one setting.

    Not into a weight with one scale for all of it: its rows would be of unlike size then.
    """
    names = {layer: name for name, layer in backbone.named_modules()}
    found = [Fold(pair, tuple(names[one] for one in pair.seconds)) for pair in pairs(backbone.get_submodule(block))]
    return [
        fold
        for fold in found
        if all(name in plans for name in fold.readers)
        and all(_smoothing(plans[name]) for name in fold.readers)
        and len({str(_smoothing(plans[name]).options) for name in fold.readers}) == 1
        and not any(_has_one_scale(plans.get(names[one])) for one in fold.pair.firsts)
    ]


@torch.no_grad()
def shared_factor(
    fold: Fold,
    plans: Mapping[str, LayerPlan],
    inputs: Mapping[str, QuantLinear],
    statistics: Mapping[str, InputStatistics | None],
) -> Tensor:
    """The factor, float32 (channels,), of the least error, summed over the readers.

    Candidates are those of one layer with the weights of all readers. `inputs` are the readers as they quantize their
    inputs; parts are loaded into them. In 16 bits factors are powers of two.
    """
    seen = [one.absmax for name in fold.readers if (one := statistics[name]) is not None]
    together = InputStatistics(torch.stack(seen).amax(0), []) if seen else None
    weights = [layer.weight.detach().float() for layer in fold.pair.seconds]
    best, least = None, float("inf")
    for parts in _smoothing(plans[fold.readers[0]]).fit(torch.cat(weights), together):
        parts = {part: fold.pair.allowed(value) for part, value in parts.items()}
        error = sum(
            _error(layer, plans[name], inputs[name], parts, statistics[name])
            for name, layer in zip(fold.readers, fold.pair.seconds, strict=True)
        )
        if best is None or error < least:
            best, least = parts, error
    return best["factor"].float().view(-1)


def _error(
    layer: nn.Linear,
    step: LayerPlan,
    quantized: QuantLinear,
    parts: dict[str, Tensor],
    statistics: InputStatistics | None,
) -> float:
    """What `output_error` is with these parts of the smoothing; 0 without samples."""
    if statistics is None:
        return 0.0
    smoothing = _smoothing(step)
    weight = smoothing.to_quantize(layer.weight.detach().float(), parts)
    fitted, weight = next(chains(_others(step), weight, statistics))
    quantized.load_parts({smoothing.name: parts, **fitted})
    return output_error(layer, step, quantized, weight, statistics.sample)


def _smoothing(step: LayerPlan) -> Transform | None:
    """The transform of a layer that may be folded."""
    return next((one for one in step.transforms if one.folds()), None)


def _others(step: LayerPlan) -> tuple[Transform, ...]:
    return tuple(one for one in step.transforms if not one.folds())


def _has_one_scale(step: LayerPlan | None) -> bool:
    return step is not None and step.weights.granularity.kind == "tensor"
