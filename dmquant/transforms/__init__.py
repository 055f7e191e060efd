"""Transforms: exact changes of a layer before it is quantized. One module here is one method, found by its name.

A module's METHOD has the options of recipes (`Options`), the tensors that a layer stores and how it runs with them
(`Storage`), their fit by calibration (`Fit`), their fit to the errors of rounding (`Correction`), and their folding
into the layer before (`Folding`). `register` takes a METHOD from anywhere else.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from dmquant.transforms.alternating import alternate
from dmquant.transforms.interfaces import Fit, Folding, InputStatistics, Method, Part, Parts, Residuals, Storage
from dmquant.transforms.pair import pairs
from dmquant.transforms.registry import correction_of, fit_of, folding_of, get_method, method_names, register


def create(
    settings: Iterable[tuple[str, dict[str, Any]]], layer: nn.Linear | nn.Conv2d, split: int | None
) -> tuple[Storage, ...]:
    """The transforms of one layer in the order in which they apply; `settings` are names and options.

    Raises UsageError for one that such a layer cannot have.
    """
    made = []
    for name, options in settings:
        method = get_method(name)
        storage = method.storage(method.Options.model_validate(options), tuple(layer.weight.shape), split)
        storage.check(layer)
        made.append(storage)
    return tuple(sorted(made, key=lambda storage: storage.STAGE))


def chains(
    transforms: tuple[Storage, ...], weight: Tensor, statistics: InputStatistics | None
) -> Iterator[tuple[dict[str, Parts], Tensor]]:
    """Every way to fit transforms one after another to a weight (out, in, ...): parts by method, weight to quantize.

    Both weights are float32. There are several ways only where a method has candidates, and `statistics` to choose by.
    """
    if not transforms:
        yield {}, weight
        return
    first, *rest = transforms
    for parts in fit_of(first).candidates(first, weight, statistics):
        for others, remaining in chains(tuple(rest), first.to_quantize(weight, parts), statistics):
            yield {first.name: parts, **others}, remaining


def folds_first(storage: Storage) -> bool:
    """Whether a transform changes the float weights of the whole model before anything else."""
    folding = folding_of(storage)
    return folding is not None and not folding.chosen


def fold_first_(module: nn.Module, layers: dict[str, tuple[Storage, ...]]) -> None:
    """Fold transforms that need no calibration into the float weights of `module`, in place.

    `layers` are the transforms of layers by name. A pair takes part where all of its second layers have the transform;
    in 16 bits its factors are powers of two, which round no weight.
    """
    names = {layer: name for name, layer in module.named_modules()}
    folding = {(type(one), name): one for name, own in layers.items() for one in own if folds_first(one)}
    for method in sorted({method for method, _ in folding}, key=lambda method: method.STAGE):
        for pair in pairs(module):
            readers = [folding.get((method, names[second])) for second in pair.seconds]
            if all(readers):
                [factor] = folding_of(readers[0]).factors(pair, None)
                pair.scale_(pair.allowed(factor))
