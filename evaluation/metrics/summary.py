"""From one value an image to what is reported: the mean with its interval, the median and the worst images."""

import torch
from torch import Tensor

from dmquant.evaluation.metrics.kind import Direction
from dmquant.evaluation.result import Backbone, Metric

RESAMPLES = 2000
WORST = 0.05  # share of the images


def summarize(values: Tensor, better: Direction, note: str | None = None, backbone: Backbone | None = None) -> Metric:
    """The mean of `values` [N], one an image, with its 95 % interval, their median and the mean of the worst 5 %.

    `values` are of any dtype and on any device; arithmetic is float64 on the CPU. `better` says which are the worst;
    at least one image is among them. One image has no interval.
    """
    values = values.double().cpu()
    low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
    worst = values.sort(descending=better == "lower").values[: max(1, round(WORST * len(values)))]
    return Metric(
        float(values.mean()),
        low,
        high,
        images=len(values),
        backbone=backbone,
        note=note,
        median=float(values.quantile(0.5)),
        worst=float(worst.mean()),
        values=tuple(values.tolist()),
    )


def bootstrap_interval(values: Tensor, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N] (Efron 1979), over 2000 seeded resamples.

    `values` are on the CPU; the ends are in their units.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    means = torch.stack([values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(RESAMPLES)])
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high
