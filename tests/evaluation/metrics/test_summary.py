"""Mean, interval, median and the worst images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.evaluation.metrics.summary import bootstrap_interval, summarize

finite = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(finite, st.sampled_from(["higher", "lower"]))
@settings(max_examples=15, deadline=None)
def test_worst_median_and_interval_lie_where_they_must(values, better):
    metric = summarize(torch.tensor(values, dtype=torch.float64), better)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= metric.median <= max(values) + slack
    if len(values) > 1:
        assert min(values) - slack <= metric.low <= metric.high <= max(values) + slack
    worse = metric.value - metric.worst if better == "higher" else metric.worst - metric.value
    assert worse >= -slack
    assert metric.values == tuple(values)


def test_the_worst_images_are_the_worst_five_percent():
    values = torch.arange(100.0).flip(0)
    assert summarize(values, "higher").worst == 2.0
    assert summarize(values, "lower").worst == 97.0
    assert summarize(values[:3], "higher").worst == 97.0  # at least one


def test_one_image_has_no_interval():
    metric = summarize(torch.tensor([3.0]), "higher")
    assert (metric.low, metric.high, metric.median, metric.worst) == (None, None, 3.0, 3.0)


def test_the_bootstrap_interval_holds_the_mean_and_shrinks_as_the_root_of_n():
    values = torch.randn(1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 30
    widths = []
    for n in (100, 1600):
        low, high = bootstrap_interval(values[:n])
        assert low < values[:n].mean() < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.2)
    assert widths[1] == pytest.approx(2 * 1.96 / 40, rel=0.1)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    draws = np.random.default_rng(0).gamma(2.0, size=(100, 40))  # skewed, of mean 2
    intervals = [bootstrap_interval(torch.from_numpy(draw)) for draw in draws]
    assert 88 <= sum(low <= 2.0 <= high for low, high in intervals) <= 99
