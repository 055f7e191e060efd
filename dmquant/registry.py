"""Things found by name: the modules of a package, and what is registered from outside."""

import importlib
import pkgutil
from collections.abc import Collection
from typing import Any

from dmquant.errors import UsageError, check_choice

ENGINES = "dmquant.exchange.engines"  # what other engines run, and how they round; by name alone: it stands above


class Registry:
    """The modules of `package`, but for those in `no_methods`, each imported when asked for, and what is registered.

    An entry is the module's `attribute`, by default the module itself.
    """

    def __init__(self, kind: str, package: str, no_methods: Collection[str], attribute: str | None = None):
        self.kind, self.package, self.attribute = kind, package, attribute
        modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
        self.own_names = [module.name for module in modules if module.name not in no_methods]
        self.registered: dict[str, Any] = {}

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted((*self.own_names, *self.registered)))

    def get(self, name: str) -> Any:
        """The entry of this name; UsageError where there is none."""
        if check_choice(self.kind, name, self.names()) in self.registered:
            return self.registered[name]
        module = importlib.import_module(f"{self.package}.{name}")
        return getattr(module, self.attribute) if self.attribute else module

    def register(self, name: str, entry: Any) -> None:
        """Make something from outside known by this name; UsageError for a name that is taken."""
        if name in self.names():
            raise UsageError(f"there is a {self.kind} '{name}' already: choose another name")
        self.registered[name] = entry


def engine_of(name: str) -> Any:
    """The engine of this name, an `Engine` of ENGINES; UsageError where there is none."""
    return importlib.import_module(ENGINES).get(name)
