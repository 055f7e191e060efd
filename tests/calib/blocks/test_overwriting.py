"""Blocks that write into their input calibrate like the same blocks that do not, or are refused."""

import pytest
import torch
from torch import nn

from dmquant.calib.data.sampling import Sample
from dmquant.errors import UserError
from tests.calib.runs import calibrated, is_same, recipe_of

WIDTH, SAMPLES = 16, 6


class Block(nn.Module):
    def __init__(self, writes):
        super().__init__()
        self.one, self.two, self.writes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), writes

    def forward(self, x):
        y = self.two(torch.relu(self.one(x)))
        if self.writes:
            x += y
            return x
        return x + y


class Net(nn.Module):
    """Two blocks with a sum between them; with `skip` the end reads again what the first block has written into."""

    def __init__(self, writes, skip=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block(writes) for _ in range(3))
        self.writes, self.skip = writes, skip

    def forward(self, sample, timestep):
        h = skip = self.first(sample)
        for block in self.blocks:
            h = block(h)
            if self.writes:
                h += 1
            else:
                h = h + 1
        return (h + skip if self.skip else h,)


class Store:
    """Random samples of one row, of as many steps."""

    rows, steps, key, weights = 1, SAMPLES, "key", None
    timesteps = tuple(map(float, range(SAMPLES)))
    samples = tuple(Sample(0, step, step > 3) for step in range(SAMPLES))

    def batch(self, indices, device="cpu"):
        draws = [torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(index)) for index in indices]
        return (), {"sample": torch.stack(draws), "timestep": torch.tensor([float(index) for index in indices])}


def case(**settings):
    return Net(**settings), [f"blocks.{index}" for index in range(3)], Store()


@pytest.mark.parametrize("unit", ["block", "window", "layer"])
@pytest.mark.parametrize("rounding", [{"method": "adaround", "regularizer": 10.0}, {"method": "gptq"}])
def test_codes_are_those_of_blocks_that_do_not_write(rounding, unit, tmp_path):
    recipe = recipe_of(rounding=rounding, learning={"unit": unit, "iterations": 4, "batch_size": 2}, keep=False)
    writing, result = calibrated(case(writes=True), recipe, tmp_path / "writing")
    plain, expected = calibrated(case(writes=False), recipe, tmp_path / "plain")
    assert len(result.layers) == 7
    assert is_same(writing, plain)
    for one, other in zip(result.blocks, expected.blocks, strict=True):
        assert one["tasks"] == other["tasks"]


def test_a_block_that_writes_into_what_others_read_afterwards_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"blocks\.0 shares a tensor that is written into and read again") as refused:
        calibrated(case(writes=True, skip=True), recipe_of(keep=False), tmp_path)
    assert "\n" not in str(refused.value)
    calibrated(case(writes=False, skip=True), recipe_of(keep=False, learning={"iterations": 2}), tmp_path)
