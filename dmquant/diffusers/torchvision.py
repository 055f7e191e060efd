"""Make `import torchvision` work beside a CPU build of torch.

PyPI's torchvision wheel is a CUDA build. Next to a CPU torch its operator library does not load, and its Python side
then fails on `operator torchvision::nms does not exist`, taking CLIP in transformers, open_clip and torchmetrics' FID
with it. Nothing here needs those operators, so declaring the two schemas that the import registers fake kernels for is
enough. Where torchvision imports normally, nothing is touched.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the schemas live as long as this object


def execute_with_operators(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Execute torchvision's own module, again with its missing operators declared if exactly they stop it."""
    global _library
    try:
        execute(module)
        return
    except RuntimeError as error:
        if _library is not None or "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    execute(module)


def ensure_torchvision_imports() -> None:
    """Import torchvision where it is installed; it is optional."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torchvision")
