"""Show the inputs of the layers of a full-precision backbone, over the samples to learn from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.data.store import CalibrationStore, timesteps_of

Watchers = Mapping[str, Callable[..., Any]]
"""Forward pre-hooks of layers, by name."""
Run = Callable[[Watchers], None]
"""Runs a full-precision backbone, or a part of it, over the samples to learn from with these watchers in place."""


@torch.inference_mode()
def run_watched(
    backbone: nn.Module,
    watchers: Watchers,
    store: CalibrationStore,
    batch_size: int,
    timesteps: Callable[[Tensor], None],
    progress: Callable[[int, int], None],
) -> None:
    """Run the backbone on its own device over the samples that are not held out, `batch_size` at a time.

    Before every call `timesteps` is called with the timesteps of its rows, (samples * rows,).
    """
    learning = [index for index, sample in enumerate(store.samples) if not sample.held_out]
    device = next(backbone.parameters()).device
    hooks = [backbone.get_submodule(name).register_forward_pre_hook(watcher) for name, watcher in watchers.items()]
    try:
        for start in range(0, len(learning), batch_size):
            batch = learning[start : start + batch_size]
            timesteps(timesteps_of(store, batch).repeat_interleave(store.rows))
            args, kwargs = store.batch(batch, device)
            backbone(*args, **kwargs)
            progress(start + len(batch), len(learning))
    finally:
        for hook in hooks:
            hook.remove()
