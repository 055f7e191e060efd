"""Place the parts of a pipeline: all on the device, or in host memory but for what runs: a part, or a block of it."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from dmquant.diffusers.families import family_of_backbone
from dmquant.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODEL, GROUP = OFFLOADS = ("model", "group")


def place(pipeline: "DiffusionPipeline", device: str, offload: str | None) -> "DiffusionPipeline":
    """The pipeline on `device`, or in host memory, from where what runs goes to `device` and back.

    `offload` says what that is: the whole part that is called (`model`), or one block of the backbone and one layer of
    any other part (`group`), on CUDA the next one while the one before still computes. Raises UserError for a pipeline
    or a backbone that diffusers does not offload so.
    """
    if offload is None:
        return pipeline.to(device)
    try:
        if offload == MODEL:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            _offload_groups(pipeline, torch.device(device))
    except ValueError as error:
        raise UserError(f"a {type(pipeline).__name__} cannot be offloaded: {error}") from error
    return pipeline


def _offload_groups(pipeline: "DiffusionPipeline", device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    for part in pipeline.components.values():
        if not isinstance(part, nn.Module):
            continue
        is_backbone = family_of_backbone(type(part).__name__) is not None
        if not getattr(part, "_supports_group_offloading", True):
            if is_backbone:
                kind = type(part).__name__
                raise UserError(f"diffusers does not offload a {kind} block by block: use --offload {MODEL}")
            part.to(device)
            continue
        apply_group_offloading(
            part,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level" if is_backbone else "leaf_level",
            num_blocks_per_group=1 if is_backbone else None,
            use_stream=device.type == "cuda",
        )


def end_offloading(pipeline: "DiffusionPipeline") -> None:
    """Take all parts of a pipeline off the hooks of `place`, and leave them in host memory."""
    from diffusers.hooks import HookRegistry, group_offloading

    pipeline.remove_all_hooks()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            registry = HookRegistry.check_if_exists_or_initialize(part)
            for name in ("GROUP_OFFLOADING", "LAYER_EXECUTION_TRACKER", "LAZY_PREFETCH_GROUP_OFFLOADING"):
                registry.remove_hook(getattr(group_offloading, f"_{name}"), recurse=True)
            part.to("cpu")


def place_backbone_alone(pipeline: "DiffusionPipeline", component: str, device: str) -> None:
    """End offloading with the backbone on `device` and all other parts in host memory, for work on the backbone."""
    end_offloading(pipeline)
    getattr(pipeline, component).to(device)
