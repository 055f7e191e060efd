"""Hooks that `import dmquant` puts on the imports of other packages, without importing anything itself.

When the registry of quantizers of diffusers or transformers is imported, ours is entered there: diffusers offers no
registration of its own. When torchvision is imported, its failure beside a CPU build of torch is mended
(`dmquant.diffusers.torchvision`); when peft is, what it does to a quantized layer that it wraps
(`dmquant.diffusers.peft`); and when diffusers' loaders of LoRAs are, their `fuse_lora` (`dmquant.diffusers.fusing`).
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_REGISTRIES = {
    "diffusers.quantizers.auto": "dmquant.diffusers.quantizer",
    "transformers.quantizers.auto": "dmquant.transformers.quantizer",
}
"""The registry of each library, and the module that enters ours there when it is imported."""
_WRAPPERS = "peft.tuners.tuners_utils"
_FUSING = {"diffusers.loaders.peft": "PeftAdapterMixin", "diffusers.loaders.lora_base": "LoraBaseMixin"}

Execute = Callable[[ModuleType], None]


def _then_register(execute: Execute, module: ModuleType) -> None:
    execute(module)
    _register(module.__name__)


def _register(registry: str) -> None:
    if registry.startswith("diffusers.") or importlib.util.find_spec("transformers.core_model_loading"):  # from 5.0
        importlib.import_module(_REGISTRIES[registry])


def _with_operators(execute: Execute, module: ModuleType) -> None:
    from dmquant.diffusers.torchvision import execute_with_operators  # imports torch, as torchvision does

    execute_with_operators(execute, module)


def _with_wrappers(execute: Execute, module: ModuleType) -> None:
    execute(module)
    _mend_wrappers(module)


def _mend_wrappers(module: ModuleType) -> None:
    from dmquant.diffusers.peft import mend  # imports torch, as peft does

    mend(module)


def _with_fusing(execute: Execute, module: ModuleType) -> None:
    execute(module)
    _mend_fusing(module)


def _mend_fusing(module: ModuleType) -> None:
    from dmquant.diffusers.fusing import with_requantize  # imports torch, as diffusers does

    kind = getattr(module, _FUSING[module.__name__])
    kind.fuse_lora = with_requantize(kind.fuse_lora)


_WATCHED: dict[str, Callable[[Execute, ModuleType], None]] = {
    **dict.fromkeys(_REGISTRIES, _then_register),
    "torchvision": _with_operators,
    _WRAPPERS: _with_wrappers,
    **dict.fromkeys(_FUSING, _with_fusing),
}


class _Finder:
    """Finds the watched modules where Python does; whoever only asks whether they are there imports nothing.

    A MetaPathFinder by what it does: importlib.abc takes a quarter of the time of `dmquant --help` to import.
    """

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in _WATCHED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watching(spec.loader, _WATCHED[name])
        return spec


class _Watching:
    """A module's own loader, except that somebody has a hand in executing the module."""

    def __init__(self, loader: Any, watch: Callable[[Execute, ModuleType], None]):
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._watch(self._loader.exec_module, module)


def install() -> None:
    """Put the hooks in place, once; if diffusers is already imported, register at once."""
    for registry in _REGISTRIES:
        if registry in sys.modules:
            _register(registry)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        if _WRAPPERS in sys.modules:
            _mend_wrappers(sys.modules[_WRAPPERS])
        for module in _FUSING.keys() & sys.modules.keys():
            _mend_fusing(sys.modules[module])
