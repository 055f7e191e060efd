"""Fit transforms to the errors that rounding leaves, once the codes of a task are decided."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dmquant.activations import TimestepRanges
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.ranges import nearest_seen
from dmquant.transforms import Parts, Residuals, Storage, correction_of


def correct(
    learners: Sequence[Learner],
    values: dict[str, Tensor],
    error: float,
    timesteps: TimestepRanges,
    run_all: Callable[[], None],
    held_out_error: Callable[[], float],
) -> float:
    """Fit the correcting transforms of a task's layers to its decided `values`; returns the error on held-out samples.

    `values` are the rounded weights by layer, float32 in matrix form (rows, columns); `error` is the held-out error
    with them. `run_all` runs the task over all samples to learn from. Methods are fitted one after another, each to all
    its layers at once; if that makes the held-out error worse, layer by layer, and a layer keeps its fit only where
    the error is not worse.
    """
    pairs = [(learner, one) for learner in learners for one in learner.quantized.transforms if correction_of(one)]
    for method in sorted({(transform.STAGE, transform.name) for _, transform in pairs}):
        observed = {
            learner.name: (learner, transform, _Observed(learner, transform, timesteps))
            for learner, transform in pairs
            if method == (transform.STAGE, transform.name)
        }
        handles = [learner.layer.register_forward_pre_hook(hook) for learner, _, hook in observed.values()]
        try:
            for learner in learners:
                learner.values = values[learner.name]
            with torch.no_grad():
                run_all()
        finally:
            for learner in learners:
                learner.values = None
            for handle in handles:
                handle.remove()
        error = _keep_what_helps(observed, values, error, held_out_error)
    return error


class _Observed:
    """A forward pre-hook on a learning layer: means of its transformed input and of the error of its output.

    Not a forward hook: a replay ends inside the layer whose output it is run for.
    """

    def __init__(self, learner: Learner, transform: Storage, timesteps: TimestepRanges):
        self.learner, self.count, self.timesteps = learner, transform.timestep_ranges, timesteps
        self.inputs: Tensor | float = 0.0
        self.outputs = torch.zeros(self.count, transform.shape[0], dtype=torch.float64)
        self.rows = torch.zeros(self.count, dtype=torch.int64)

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, quantized = args[0].to(layer.weight.dtype), self.learner.quantized
        lacking = type(layer).forward(layer, x).float() - self.learner.forward(x).float()
        of_rows = self.timesteps.of_rows[self.count].cpu() if self.count > 1 else torch.zeros(len(x), dtype=torch.int64)
        magnitude = quantized.inputs(x)[-1].abs().float()
        self.inputs = self.inputs + _row_means(magnitude, quantized.channel_dim, len(of_rows)).sum(0)
        self.outputs.index_add_(0, of_rows, _row_means(lacking, quantized.channel_dim, len(of_rows)))
        self.rows += torch.bincount(of_rows, minlength=self.count)

    def residuals(self, values: Tensor) -> Residuals | None:
        """None where no sample reached the layer; a range without samples takes the means of the nearest that has."""
        if not self.rows.any():
            return None
        means = (self.outputs / self.rows.clamp(min=1).unsqueeze(-1))[nearest_seen(self.rows > 0)]
        grid = self.learner.grid
        lost = grid.as_weight(grid.weight - values)
        inputs = self.inputs / self.rows.sum()
        return Residuals(lost, inputs.float().to(lost.device), means.float().to(lost.device))


def _row_means(x: Tensor, dim: int, rows: int) -> Tensor:
    """Means over the positions of each of the call's rows, (rows, channels), float64."""
    channels_last = x.movedim(dim, -1)
    return channels_last.reshape(rows, -1, channels_last.shape[-1]).mean(1, dtype=torch.float64).cpu()


def _keep_what_helps(
    observed: dict[str, tuple[Learner, Storage, _Observed]],
    values: dict[str, Tensor],
    error: float,
    held_out_error: Callable[[], float],
) -> float:
    before, after = {}, {}
    for name, (learner, transform, hook) in observed.items():
        if residuals := hook.residuals(values[name]):
            before[name] = {
                transform.name: {part: each.clone() for part, each in learner.quantized.parts(transform).items()}
            }
            after[name] = {transform.name: correction_of(transform)(transform, residuals)}

    def load(name: str, parts: dict[str, Parts]) -> None:
        observed[name][0].quantized.load_parts(parts)

    for name, parts in after.items():
        load(name, parts)
    together = held_out_error()
    if together <= error:
        return together
    for name, parts in before.items():
        load(name, parts)
    for name, parts in after.items():
        load(name, parts)
        alone = held_out_error()
        if alone <= error:
            error = alone
        else:
            load(name, before[name])
    return error
