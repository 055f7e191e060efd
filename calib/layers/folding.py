"""Fold transforms of layers into those before them: no factor is stored then, and nothing multiplied at run time.

Folding is possible where only a linear function lies between two layers (dmquant.transforms.pair). It changes the float
layers of a block before anything else is computed with them, so that targets, scales and roundings belong to the folded
block, which is the same function.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dmquant.calib.layers.fitting import WORTH, choose, output_error, with_outputs
from dmquant.calib.layers.ranges import scale_times
from dmquant.convert import LayerPlan
from dmquant.layers import QuantLinear
from dmquant.transforms import InputStatistics, Storage, chains, fit_of, folding_of
from dmquant.transforms.pair import Pair, pairs


@dataclass(frozen=True)
class Fold:
    """A pair of layers whose second ones, by name, leave a transform to the first ones."""

    method: str
    pair: Pair
    readers: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of its factor among a block's tensors on disk."""
        return f"{self.readers[0]}.{self.method}_folded"


def folded_methods(plans: Mapping[str, LayerPlan]) -> list[str]:
    """The transforms that may be folded, by name, in the order in which they apply."""
    found = {one.name: one.STAGE for step in plans.values() for one in step.transforms if _is_chosen(one)}
    return sorted(found, key=found.get)


def folds_of(backbone: nn.Module, block: str, plans: Mapping[str, LayerPlan], method: str) -> list[Fold]:
    """Places in the module `block` where a transform can be folded: all readers of a layer have it, with one setting.

    A weight with granularity `tensor` is no such place: its rows would be of unlike size then.
    """
    names = {layer: name for name, layer in backbone.named_modules()}
    found = [Fold(method, pair, tuple(map(names.get, pair.seconds))) for pair in pairs(backbone.get_submodule(block))]
    return [
        fold
        for fold in found
        if all(name in plans for name in fold.readers)
        and all(_folding(plans[name], method) for name in fold.readers)
        and len({str(_folding(plans[name], method).options) for name in fold.readers}) == 1
        and not any(_has_one_scale(plans.get(names[one])) for one in fold.pair.firsts)
    ]


@torch.no_grad()
def shared_factor(
    fold: Fold,
    plans: Mapping[str, LayerPlan],
    inputs: Mapping[str, QuantLinear],
    statistics: Mapping[str, InputStatistics | None],
) -> Tensor:
    """The factor to fold, float32 (channels,), chosen (`choose`) by the error summed over the readers.

    `inputs` are the readers as they quantize their inputs; the folded transform is taken from them, and they get parts
    of the others. Factors of layers in 16 bits are powers of two.
    """
    seen = [one.absmax for name in fold.readers if (one := statistics[name]) is not None]
    together = InputStatistics(torch.stack(seen).amax(0), []) if seen else None
    transform = _folding(plans[fold.readers[0]], fold.method)
    factors = folding_of(transform).factors(fold.pair, together)
    samples = {
        name: with_outputs(layer, one.sample) if (one := statistics[name]) is not None else []
        for name, layer in zip(fold.readers, fold.pair.seconds, strict=True)
    }

    scales = {name: inputs[name].input_scale.view(torch.float32) for name in samples if seen and inputs[name].is_static}

    def error(factor: Tensor) -> float:
        """The sum of `output_error` over the readers once the factor is folded."""
        total = 0.0
        for name, layer in zip(fold.readers, fold.pair.seconds, strict=True):
            others = without(plans[name], fold.method).transforms
            parts, weight = next(chains(others, layer.weight.detach().float() / factor, statistics[name]))
            inputs[name].transforms = others
            inputs[name].load_parts(parts)
            if name in scales:
                absmax, spec = statistics[name].absmax.amax(0), inputs[name].activations
                inputs[name].load_input_scale(scale_times(scales[name], spec, absmax, factor))
            scaled = [(x * factor.to(x.dtype), output) for x, output in samples[name]]
            total += output_error(layer, plans[name], inputs[name], weight, scaled)
        return total

    worth = WORTH if fit_of(transform).optional else 1.0
    return choose(map(fold.pair.allowed, factors), error, worth) if seen else factors[0]


def without(step: LayerPlan, method: str) -> LayerPlan:
    """The plan of a layer once a transform, by name, is folded into the layer before."""
    return replace(step, transforms=tuple(one for one in step.transforms if one.name != method))


def _folding(step: LayerPlan, method: str) -> Storage | None:
    """The transform of a layer by this name, if calibration may fold it."""
    return next((one for one in step.transforms if one.name == method and _is_chosen(one)), None)


def _is_chosen(transform: Storage) -> bool:
    folding = folding_of(transform)
    return folding is not None and folding.chosen


def _has_one_scale(step: LayerPlan | None) -> bool:
    return step is not None and step.weights.granularity.kind == "tensor"
