"""A backbone without its weights: names and shapes of its layers from its config.json."""

from pathlib import Path

import torch
from torch import nn

from dmquant.errors import UserError
from dmquant.pipelines.models import folders


def skeleton(folder: Path) -> nn.Module:
    """The backbone of the component in `folder` at full precision, on the meta device.

    Raises UserError for a config.json that the installed diffusers cannot build.
    """
    import diffusers

    config = folders.read_json(folder / "config.json")
    config.pop("quantization_config", None)
    name = config.pop("_class_name", None)
    model = getattr(diffusers, str(name), None)
    if model is None:
        raise UserError(f"{folder / 'config.json'} is of a {name}, which diffusers {diffusers.__version__} lacks")
    try:
        with torch.device("meta"):
            return model.from_config(config)
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"diffusers cannot build the {name} of {folder / 'config.json'}: {reason}") from error
