"""PD-Quant's distribution correction: inputs move towards the statistics of all samples, and only where they differ."""

import itertools

import pytest
import torch
from torch import nn

from dmquant.activations import TimestepRanges
from dmquant.calib.blocks.distribution import Correction
from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.blocks.streams import Streams
from dmquant.calib.blocks.trace import trace
from dmquant.calib.blocks.units import Task, find_blocks
from dmquant.recipe import Learning
from tests.calib.objectives.test_tail import SAMPLES, WIDTH, InMemory, Toy
from tests.calib.runs import calibrated, is_same, recipe_of

CPU, TASK = torch.device("cpu"), Task("blocks.1", ("blocks.1.1",), ("blocks.1",))
LEARNING = list(range(0, SAMPLES, 2))
OTHERS = list(range(1, SAMPLES, 2))


def silent(*args):
    pass


def corrected(store, steps, norm=True):
    """The first block's outputs for all samples, before and after the correction of the second one's inputs."""
    backbone = Toy()
    backbone.blocks[1].insert(0, nn.LayerNorm(WIDTH) if norm else nn.Identity())
    backbone.requires_grad_(False)
    names = ["blocks.0", "blocks.1"]
    blocks = find_blocks(names, ["blocks.0.0", "blocks.1.1"], lambda names: trace(backbone, store.batch([0]), names))
    streams = Streams(
        backbone, blocks, store, TimestepRanges(()), Budget(1 << 30, None), Learning(batch_size=8), range(SAMPLES)
    )
    for number in (0, 1):
        streams.carry(streams.full, number, "", silent)
    stream = Correction(streams, 1, TASK, steps).stream(LEARNING, "", silent)
    assert list(stream) == ["blocks.0"]
    return tuple(one["blocks.0"].read(range(SAMPLES), CPU) for one in (streams.full, stream))


def distance(x, means):
    """Of a sample's channel statistics from the mean ones, over all samples to learn from."""
    return sum((own - mean).square().sum().item() for own, mean in zip(statistics(x[LEARNING]), means, strict=True))


def statistics(x):
    return x.mean(1), x.std(1, correction=0)


def test_the_distance_of_statistics_falls_with_every_step_and_samples_to_judge_by_stay():
    before, _ = corrected(InMemory(), 0)
    means = [one.mean(0) for one in statistics(before[LEARNING])]
    distances = [distance(before, means)]
    for steps in (1, 10, 30):
        _, after = corrected(InMemory(), steps)
        distances.append(distance(after, means))
        assert torch.equal(after[OTHERS], before[OTHERS])
    assert all(late < early for early, late in itertools.pairwise(distances))
    assert distances[-1] < 0.95 * distances[0]


@pytest.mark.parametrize("alike", [True, False])
def test_inputs_whose_statistics_match_and_those_of_units_without_norms_stay(alike):
    store = InMemory()
    if alike:
        store.inputs = store.inputs[:1].expand_as(store.inputs).clone()
    before, after = corrected(store, 5, norm=alike)
    assert torch.equal(before, after)


def test_it_changes_what_is_learned_and_repeats(tmp_path):
    backbone = Toy()
    backbone.blocks[1].insert(0, nn.LayerNorm(WIDTH))
    case = backbone, ["blocks.0", "blocks.1"], InMemory()

    def learned(folder, **learning):
        recipe = recipe_of(learning={"iterations": 6, "batch_size": 8, "full_precision_inputs": 0.5} | learning)
        return calibrated(case, recipe, tmp_path / folder)[0]

    first, again = (learned(name, distribution_steps=5) for name in ("first", "again"))
    assert is_same(first, again)
    assert not is_same(first, learned("without"))
