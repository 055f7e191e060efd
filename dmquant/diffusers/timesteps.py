"""The timestep of a backbone's call, told to those of its layers that differ by timestep range."""

import inspect
from typing import Any

from torch import nn

from dmquant.activations import TimestepRanges
from dmquant.errors import UsageError
from dmquant.layers import QUANTIZED


def timestep_counts(layer: nn.Module) -> set[int]:
    """The numbers of timestep ranges by which a quantized layer's scales and transforms differ; none of another's."""
    if not isinstance(layer, tuple(QUANTIZED.values())):
        return set()
    own = layer.activations.ranges if layer.is_static else 1
    return {own, *(transform.timestep_ranges for transform in layer.transforms)} - {1}


def share_timesteps(module: nn.Module) -> TimestepRanges | None:
    """One `TimestepRanges` for the layers of `module` that differ by timestep; None where there are none."""
    counts = {layer: found for layer in module.modules() if (found := timestep_counts(layer))}
    if not counts:
        return None
    shared = TimestepRanges(set().union(*counts.values()))
    for layer in counts:
        layer.timestep_ranges = shared
    return shared


class TellTimestep:
    """A forward pre-hook that tells a backbone's static layers the timestep; a class, so that copies keep apart."""

    def __init__(self, backbone: nn.Module, ranges: TimestepRanges):
        parameters = list(inspect.signature(type(backbone).forward).parameters)
        if "timestep" not in parameters:
            raise UsageError(
                f"{type(backbone).__name__} is called without a timestep, so its layers cannot differ by "
                "timestep range: use activation scales static:1 or online, and bias with ranges: 1"
            )
        self.position = parameters.index("timestep") - 1  # not counting self
        self.ranges = ranges

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs.get("timestep", next(iter(args[self.position :]), None))
        if timestep is None:
            raise RuntimeError(f"{type(backbone).__name__} was called without a timestep")
        self.ranges.set(timestep)


def tell_timesteps(model: nn.Module) -> None:
    """Let every call of `model` tell its layers the timestep, where some differ by timestep range."""
    forget_timesteps(model)
    if ranges := share_timesteps(model):
        model.register_forward_pre_hook(TellTimestep(model, ranges), with_kwargs=True)


def forget_timesteps(model: nn.Module) -> None:
    """Undo `tell_timesteps`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, TellTimestep)]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
