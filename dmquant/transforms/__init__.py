"""Transforms: exact changes of a layer before it is quantized. One module here is one method, found by its name.

A method is a module with

- `Options`: a pydantic model of the method's own settings in a recipe;
- `METHOD`: a `Transform`, which says what the layer stores and what becomes of its weight, input and output.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dmquant.errors import unknown
from dmquant.transforms.alternating import alternate
from dmquant.transforms.base import InputStatistics, Part, Residuals, Transform

__all__ = [
    "InputStatistics",
    "Part",
    "Residuals",
    "Transform",
    "alternate",
    "chains",
    "create",
    "get_method",
    "method_names",
    "prepare_",
]

_PARTS = ("alternating", "base", "pair")  # modules here that are no methods


@functools.cache
def get_method(name: str) -> ModuleType:
    """The module of a transform; UsageError for a name there is none of."""
    if name not in method_names():
        raise unknown("transform", name, method_names(), f"known: {', '.join(method_names())}")
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def method_names() -> tuple[str, ...]:
    """Names of all transforms."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS))


def create(
    settings: Iterable[tuple[str, dict[str, Any]]], layer: nn.Linear | nn.Conv2d, split: int | None
) -> tuple[Transform, ...]:
    """The transforms of one layer in the order in which they apply; `settings` are names and options.

    Raises UsageError for one that such a layer cannot have.
    """
    made = []
    for name, options in settings:
        module = get_method(name)
        transform = module.METHOD(module.Options.model_validate(options), tuple(layer.weight.shape), split)
        transform.check(layer)
        made.append(transform)
    return tuple(sorted(made, key=lambda transform: transform.STAGE))


def chains(
    transforms: tuple[Transform, ...], weight: Tensor, statistics: InputStatistics | None
) -> Iterator[tuple[dict[str, dict[str, Tensor]], Tensor]]:
    """Every way to fit the transforms of a float32 weight one after another: parts by method, the weight to quantize.

    There are several only where a method has candidates and `statistics` to choose by.
    """
    if not transforms:
        yield {}, weight
        return
    first, *rest = transforms
    for parts in first.fit(weight, statistics):
        for others, remaining in chains(tuple(rest), first.to_quantize(weight, parts), statistics):
            yield {first.name: parts, **others}, remaining


def prepare_(module: nn.Module, layers: dict[str, tuple[Transform, ...]]) -> None:
    """Let the transforms of all `layers`, by name, change the float weights of `module` in place.

    Those that calibration folds are left to it.
    """
    chosen: dict[type[Transform], set[str]] = {}
    for name, transforms in layers.items():
        for transform in transforms:
            if not transform.folds():
                chosen.setdefault(type(transform), set()).add(name)
    for method in sorted(chosen, key=lambda method: method.STAGE):
        method.prepare_(module, chosen[method])
