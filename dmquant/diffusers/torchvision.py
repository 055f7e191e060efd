"""Make `import torchvision` work beside a CPU build of torch.

The registry's torchvision wheel is a CUDA build. Next to a CPU torch its operator library does not load, and
its Python side then fails on `operator torchvision::nms does not exist`, taking CLIP in transformers,
open_clip and torchmetrics' FID with it. Nothing here needs those operators, so declaring the two schemas that
the import registers fake kernels for is enough. Where torchvision imports normally, nothing is touched.
"""

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the schemas live as long as this object


def ensure_torchvision_imports() -> None:
    """Import torchvision, declaring its missing operators if exactly that is what stops it.

    Does nothing when torchvision is not installed: it is optional.
    """
    global _library
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
        import torchvision  # noqa: F401
