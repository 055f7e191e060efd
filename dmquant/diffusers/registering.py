"""What `import dmquant` arranges for other packages' imports, without importing them itself.

Before diffusers, transformers, peft, open_clip or torchmetrics is imported, torchvision is made importable
(`dmquant.diffusers.torchvision`). After diffusers' quantizer registry is imported, ours is entered there: diffusers
offers no registration of its own.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_USE_TORCHVISION = {"diffusers", "transformers", "peft", "open_clip", "torchmetrics"}
_REGISTRY = "diffusers.quantizers.auto"
_OURS = "dmquant.diffusers.quantizer"


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name in _USE_TORCHVISION:
            from dmquant.diffusers.torchvision import ensure_torchvision_imports

            ensure_torchvision_imports()
        if name != _REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(_OURS)  # which registers itself


def install() -> None:
    """Arrange all this, once; if diffusers is already imported, register at once."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
