"""The transforms by name: each module of this package that has a METHOD, and those registered from outside."""

from dmquant.registry import Registry
from dmquant.transforms.interfaces import Correction, Fit, Folding, Method, Storage

METHODS = Registry("transform", __package__, ("alternating", "interfaces", "pair", "registry"), attribute="METHOD")
get_method, method_names = METHODS.get, METHODS.names


def register(method: Method) -> Method:
    """Make a transform known by its storage's name; UsageError where there is one of this name."""
    METHODS.register(method.storage.name, method)
    return method


def fit_of(storage: Storage) -> Fit:
    """The fit of a layer's transform."""
    return get_method(storage.name).fit(storage.options)


def correction_of(storage: Storage) -> Correction | None:
    """The fit of a layer's transform to the errors of rounding; None where it has none."""
    return get_method(storage.name).correction(storage.options)


def folding_of(storage: Storage) -> Folding | None:
    """The folding of a layer's transform into the layer before; None where it has none."""
    return get_method(storage.name).folding(storage.options)
