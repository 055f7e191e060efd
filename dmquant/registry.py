"""Methods by name: the modules of a package, one a method, and what is registered from outside of it."""

import importlib
import pkgutil
from collections.abc import Collection
from functools import cached_property
from typing import Any

from dmquant.errors import UsageError, unknown


class Registry:
    """The methods of one `kind`: every module of `package` but its `parts`, imported when asked for."""

    def __init__(self, package: str, kind: str, parts: Collection[str] = ()):
        self.package, self.kind, self.parts = package, kind, parts
        self.registered: dict[str, Any] = {}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of the package's own methods."""
        found = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return tuple(module.name for module in found if module.name not in self.parts)

    def names(self) -> tuple[str, ...]:
        """Names of all methods, sorted."""
        return tuple(sorted({*self.modules, *self.registered}))

    def get(self, name: str) -> Any:
        """The method of this name; UsageError, with all names, where there is none."""
        if name in self.registered:
            return self.registered[name]
        if name not in self.modules:
            raise unknown(self.kind, name, self.names(), f"known: {', '.join(self.names())}")
        return importlib.import_module(f"{self.package}.{name}")

    def register(self, name: str, method: Any) -> None:
        """Add a method from outside; UsageError for a name that is taken."""
        if name in self.names():
            raise UsageError(f"there is a {self.kind} '{name}' already: choose another name")
        self.registered[name] = method
