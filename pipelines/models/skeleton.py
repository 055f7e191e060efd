"""A model without its weights: names and shapes of its layers from its config.json."""

from pathlib import Path

import torch
from torch import nn

from dmquant.diffusers.bounds import bounded, check_buffers, check_sizes
from dmquant.errors import UserError
from dmquant.host import weight_file
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.weights import weight_files

UNKNOWN = 10_000  # tensors that a model may have whose weights are not here


def skeleton(part: Path, kind: type[nn.Module] | None = None, on: str = "meta") -> nn.Module:
    """The model of the component in the folder `part` at full precision, its parameters on the meta device.

    `kind` is its class in diffusers; by default the one that config.json names. On another device than meta, buffers
    are what a model that is loaded has, and parameters are not initialised. Raises UserError for a config.json
    that the installed diffusers cannot build, and, within a second, for one of a far larger model than its weights.
    """
    import diffusers
    from diffusers.models.modeling_utils import no_init_weights

    where, config = part / "config.json", folders.read_json(part / "config.json")
    config.pop("quantization_config", None)
    name = config.pop("_class_name", None)
    model = kind or getattr(diffusers, str(name), None)
    if model is None:
        raise UserError(f"{where} is of a {name}, which diffusers {diffusers.__version__} lacks")
    files = weight_files(part)
    stored = [tensor for path in files for tensor in weight_file.header(path).values()]
    if files:
        check_sizes(config, stored, str(where))
    try:
        # To draw no numbers takes as long as everything else does.
        with bounded(len(stored) or UNKNOWN, str(where)), no_init_weights(), torch.device(on):
            built = model.from_config(config)
    except UserError:
        raise
    except Exception as error:  # whatever the constructors of diffusers raise on settings that do not go together
        reason = " ".join(str(error).split())
        raise UserError(f"diffusers cannot build the {name} of {where}: {reason}") from error
    if files:
        check_buffers(built, sum(path.stat().st_size for path in files), str(where))
    return built
