"""Other engines: what their kernels run, and how they round inputs. Each is a module here with an object `ENGINE`.

The core asks for them by name (`dmquant.registry.engine_of`), so that a model that was made for one loads by itself.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from dmquant.errors import check_choice
from dmquant.exchange.engines.engine import Engine


@functools.cache
def engines() -> Mapping[str, Engine]:
    """Every engine by its name, which is that of the format it reads (`dmquant.exchange.formats`)."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.ENGINE.name: module.ENGINE for module in modules if hasattr(module, "ENGINE")}


def get(name: str) -> Engine:
    """The engine of this name; UsageError where there is none."""
    return engines()[check_choice("engine", name, engines())]
