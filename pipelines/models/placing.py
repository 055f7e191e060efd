"""Place the parts of a pipeline: all on the device, or in host memory but for the one that runs."""

from typing import TYPE_CHECKING

from torch import nn

from dmquant.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def place(pipeline: "DiffusionPipeline", device: str, offload: bool) -> "DiffusionPipeline":
    """The pipeline on `device`; with `offload` each part goes there when it runs and back to host memory afterwards.

    Raises UserError for a pipeline class of which diffusers does not know the order in which its parts run.
    """
    if not offload:
        return pipeline.to(device)
    try:
        pipeline.enable_model_cpu_offload(device=device)
    except ValueError as error:
        raise UserError(f"a {type(pipeline).__name__} cannot be offloaded: {error}") from error
    return pipeline


def place_backbone_alone(pipeline: "DiffusionPipeline", component: str, device: str) -> None:
    """End offloading with the backbone on `device` and all other parts in host memory, for work on the backbone."""
    pipeline.remove_all_hooks()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.to(device if name == component else "cpu")
