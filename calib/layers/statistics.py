"""Statistics of the input of one layer, for the transforms that are fitted to it."""

import torch
from torch import Tensor

from dmquant.calib.layers.moments import some_of
from dmquant.calib.layers.ranges import nearest_seen
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.transforms import InputStatistics, fit_of

SAMPLES = 32  # calls of a layer whose inputs are kept, spread over the schedule
TOKENS, SIDE = 64, 16  # at most so many tokens of a kept row, or pixels in each direction around its middle


class InputObserver:
    """Collects `InputStatistics` of one layer over `calls` calls, told apart by timestep as its transforms want.

    `quantized.timestep_ranges` has the ranges of the rows of the current call.
    """

    def __init__(self, quantized: QuantLinear | QuantConv2d, calls: int):
        self.dim, self.every, self.calls = quantized.channel_dim, -(-calls // SAMPLES), 0
        self.timesteps = quantized.timestep_ranges
        self.count = max(fit_of(transform).statistics for transform in quantized.transforms)
        self.absmax: Tensor | None = None
        self.seen = torch.zeros(self.count, dtype=torch.bool)
        self.sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Count an input (rows, ..., in) or (rows, in, height, width), any float dtype.

        The first two rows of every few calls are kept as a sample: with guidance, one of each branch.
        """
        of_rows = self.timesteps.of_rows[self.count] if self.count > 1 else torch.zeros(1, dtype=torch.int64)
        channels_last = x.movedim(self.dim, -1)
        largest = channels_last.reshape(len(of_rows), -1, channels_last.shape[-1]).abs().amax(1).float()
        if self.absmax is None:
            self.absmax = largest.new_zeros(self.count, largest.shape[1])
        for number in of_rows.unique().tolist():
            self.seen[number] = True
            self.absmax[number] = self.absmax[number].maximum(largest[(of_rows == number).to(x.device)].amax(0))
        if self.calls % self.every == 0:
            rows = x[:2]  # rows of a sample stay together (calib.data.store)
            if self.dim != -1:
                top, left = (max(0, (side - SIDE) // 2) for side in rows.shape[-2:])
                rows = rows[..., top : top + SIDE, left : left + SIDE]
            elif rows.ndim > 2:
                rows = rows[..., some_of(rows.shape[-2], TOKENS, rows.device), :]
            self.sample.append(rows.clone())
        self.calls += 1

    def statistics(self) -> InputStatistics | None:
        """`absmax` (ranges, channels) float32 and the kept inputs; None where no call was counted."""
        if self.absmax is None:
            return None
        return InputStatistics(self.absmax[nearest_seen(self.seen).to(self.absmax.device)], self.sample)
