"""Formats of other engines, each a module or package here with an object `FORMAT`, found by name."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace

from dmquant.errors import UsageError, check_choice
from dmquant.exchange.interfaces import ForeignFormat


@functools.cache
def formats() -> Mapping[str, ForeignFormat]:
    """Every format by its name, in the order of the names."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {one.name: one for one in sorted((module.FORMAT for module in modules), key=lambda one: one.name)}


def writable(name: str) -> ForeignFormat:
    """The writable format of a name, or of a name and a variant as in `gguf:q5_k`; UsageError where there is none."""
    name, colon, variant = name.partition(":")
    one = formats()[check_choice("format", name, [one.name for one in formats().values() if one.export])]
    if not colon:
        return one
    if not one.variants:
        raise UsageError(f"{name} has no variants: leave out {colon}{variant}")
    check_choice(f"variant of {name}", variant, one.variants)
    weighs = one.weighs_errors and functools.partial(one.weighs_errors, kind=variant)
    return replace(one, export=functools.partial(one.export, kind=variant), weighs_errors=weighs)
