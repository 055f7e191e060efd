"""What an error of each input channel of a layer costs: the mean square of the channel on calibration data."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.moments import alike

CALLS = 128  # of the backbone, spread over those that are stored


@torch.no_grad()
def mean_squares(
    backbone: nn.Module,
    layers: Collection[str],
    store: CalibrationStore,
    device: str | torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Tensor], int]:
    """Mean square of each channel of the inputs of Linear `layers`, (channels,) float32 by name, and of how many calls.

    Each row of a call counts alike whatever its size (`alike`), as for second moments. A layer that no call reached
    is left out. `backbone` is on `device`; `progress` is told of calls done of how many.
    """
    sums: dict[str, Tensor] = {}
    positions = dict.fromkeys(layers, 0)

    def watch(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = alike(inputs[0]).flatten(0, -2)
            sums[name] = sums.get(name, 0) + tokens.square().sum(0)
            positions[name] += len(tokens)

        return add

    hooks = [backbone.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        count = min(CALLS, len(store))
        for done in range(count):
            arguments, keywords = store.batch([done * len(store) // count], device)
            backbone(*arguments, **keywords)
            progress(done + 1, count)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / positions[name]).cpu() for name, total in sums.items()}, count
