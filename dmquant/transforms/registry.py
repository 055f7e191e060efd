"""The transforms by name: each module of this package that has a METHOD, and those registered from outside."""

import functools
import importlib
import pkgutil

from dmquant.errors import UsageError, unknown
from dmquant.transforms.interfaces import Correction, Fit, Folding, Method, Storage

_PACKAGE = __name__.rpartition(".")[0]
_NO_METHODS = ("alternating", "interfaces", "pair", "registry")
_registered: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a transform known by its storage's NAME; UsageError where there is one of this name."""
    name = method.storage.NAME
    if name in method_names():
        raise UsageError(f"there is a transform '{name}' already: give the other one another name")
    _registered[name] = method
    return method


def get_method(name: str) -> Method:
    """A transform; UsageError for a name there is none of."""
    if name in _registered:
        return _registered[name]
    if name not in _own_names():
        raise unknown("transform", name, method_names(), f"known: {', '.join(method_names())}")
    return importlib.import_module(f"{_PACKAGE}.{name}").METHOD


def method_names() -> tuple[str, ...]:
    """Names of all transforms."""
    return tuple(sorted((*_own_names(), *_registered)))


def fit_of(storage: Storage) -> Fit:
    """How a layer's transform is fitted."""
    return get_method(storage.name).fit(storage.options)


def correction_of(storage: Storage) -> Correction | None:
    """How a layer's transform is fitted to what rounding left wrong; None where it is not."""
    return get_method(storage.name).correction(storage.options)


def folding_of(storage: Storage) -> Folding | None:
    """How a layer's transform goes into the layer before; None where it does not."""
    return get_method(storage.name).folding(storage.options)


@functools.cache
def _own_names() -> tuple[str, ...]:
    package = importlib.import_module(_PACKAGE)
    return tuple(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in _NO_METHODS)
