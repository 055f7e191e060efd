"""Windows of blocks: what is learned together, what goes on from one to the next, and what a kill costs."""

import itertools

import pytest
import torch
from torch import nn

from dmquant.calib.blocks import block
from dmquant.calib.data.sampling import Sample
from dmquant.errors import UsageError
from dmquant.recipe import Recipe
from tests.calib.runs import calibrated, is_same, recipe_of

WIDTH, ROWS, SAMPLES, BLOCKS = 16, 16, 16, 4
GPTQ = {"method": "adaround", "regularizer": 10.0, "begin": {"method": "gptq", "damping": 0.1}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))


class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, sample, timestep):
        for one in self.blocks:
            sample = one(sample)
        return (sample,)


class Store:
    """Random samples of one row, of as many steps; the last four are held out."""

    rows, steps, key, weights = 1, SAMPLES, "key", None
    timesteps = tuple(map(float, range(SAMPLES)))
    samples = tuple(Sample(0, step, step >= SAMPLES - 4) for step in range(SAMPLES))

    def batch(self, indices, device="cpu"):
        draws = [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index)) for index in indices]
        return (), {"sample": torch.stack(draws), "timestep": torch.tensor([float(index) for index in indices])}


def case(blocks=None):
    torch.manual_seed(0)
    blocks = blocks or [Block() for _ in range(BLOCKS)]
    return Net(blocks), [f"blocks.{index}" for index in range(len(blocks))], Store()


def recipe(unit="window", rounding=None, iterations=8, **learning):
    options = {"unit": unit, "iterations": iterations, "batch_size": 4} | learning
    chosen = {"rounding": rounding} if rounding else {}
    return recipe_of(keep=False, learning=options, weights="int3", **chosen)


def error(case, backbone):
    held_out = [index for index, sample in enumerate(Store.samples) if sample.held_out]
    kwargs = Store().batch(held_out)[1]
    with torch.no_grad():
        return (backbone(**kwargs)[0] - case[0](**kwargs)[0]).square().mean().item()


@pytest.fixture
def watched(monkeypatch):
    """The tasks that are decided, with the learners of each as they are left."""
    seen, decide = [], block.Decider.decide

    def watching(decider, task, *others):
        before = {name: learner.rounding.v.detach().clone() for name, learner in decider.carried.learners.items()}
        found = decide(decider, task, *others)
        after = {name: learner.rounding.v.detach().clone() for name, learner in decider.carried.learners.items()}
        seen.append((task, before, after, set(found[1])))
        return found

    monkeypatch.setattr(block.Decider, "decide", watching)
    return seen


def test_a_window_of_one_block_is_block_reconstruction(tmp_path):
    one, of_windows = calibrated(case(), recipe(window=1), tmp_path / "window")
    other, of_blocks = calibrated(case(), recipe("block"), tmp_path / "block")
    assert is_same(one, other)
    assert [one["tasks"] for one in of_windows.blocks] == [one["tasks"] for one in of_blocks.blocks]


def test_roundings_go_on_where_the_window_before_left_them_and_are_decided_in_their_last(tmp_path, watched):
    calibrated(case(), recipe(window=3), tmp_path)
    names = [{f"blocks.{index}.{layer}" for layer in ("one", "two")} for index in range(BLOCKS)]
    assert [decided for *_, decided in watched] == [names[0], names[1] | names[2] | names[3]]
    assert [task.output for task, *_ in watched] == ["blocks.2", "blocks.3"]
    for (_, _, left, _), (_, taken, *_) in itertools.pairwise(watched):
        assert left.keys() == taken.keys()
        assert all(torch.equal(left[name], taken[name]) for name in left)
    assert watched[0][2].keys() == names[1] | names[2]


@pytest.mark.parametrize(("window", "overlap", "learnt"), [(2, 0, 2), (3, 1, 2), (4, None, 1)])
def test_windows_overlap_by_as_many_blocks_as_they_are_told(tmp_path, watched, window, overlap, learnt):
    told = []
    _, done = calibrated(case(), recipe(window=window, overlap=overlap), tmp_path / "codes", say=told.append)
    assert len(watched) == learnt
    assert sum("decided with the blocks before it" in line for line in told) == BLOCKS - learnt
    assert [one["name"] for one in done.blocks] == [f"blocks.{index}" for index in range(BLOCKS)]
    assert all(one["tasks"][0]["error"] <= one["tasks"][0]["nearest_error"] for one in done.blocks)


@pytest.mark.parametrize(("window", "overlap", "rounding"), [(2, None, GPTQ), (3, 1, None)])
def test_stopped_and_run_again_it_gives_the_same_codes_and_leaves_nothing_else(tmp_path, window, overlap, rounding):
    def stop(line):
        raise KeyboardInterrupt

    chosen = recipe(window=window, overlap=overlap, rounding=rounding)
    whole, done = calibrated(case(), chosen, tmp_path / "whole")
    for _ in range(BLOCKS - 1):
        with pytest.raises(KeyboardInterrupt):
            calibrated(case(), chosen, tmp_path / "stopped", say=stop)
    again, resumed = calibrated(case(), chosen, tmp_path / "stopped")
    assert is_same(again, whole)
    assert [one["tasks"] for one in resumed.blocks] == [one["tasks"] for one in done.blocks]
    for folder in ("whole", "stopped"):
        kept = (tmp_path / folder / "blocks").glob("*.json")
        assert sorted(path.name for path in kept) == [f"{number:03d}.json" for number in range(BLOCKS)]


def stretched(seed):
    """A linear block whose singular values run over three decades."""
    layer = nn.Linear(WIDTH, WIDTH)
    first, _, last = torch.linalg.svd(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))
    layer.weight.data = first @ torch.diag(torch.logspace(0.5, -2.5, WIDTH)) @ last
    return nn.Sequential(layer)


@pytest.mark.parametrize("seed", range(2))
def test_what_the_next_block_makes_of_an_error_counts_in_a_window(tmp_path, seed):
    """Against blocks one after another, whose first does not know which of its directions the second one reads."""
    two = case([nn.Sequential(nn.Linear(WIDTH, WIDTH)), stretched(seed)])
    errors = [
        error(two, calibrated(two, recipe(unit, iterations=150), tmp_path / unit)[0]) for unit in ("block", "window")
    ]
    assert errors[1] <= 0.9 * errors[0]


@pytest.mark.parametrize(
    ("learning", "message"),
    [
        ({"window": 5}, r"learning\.window: 5 blocks are more than the 4 that this model has"),
        ({"window": 2, "overlap": 2}, "windows of 2 blocks share at most 1 with the next"),
    ],
)
def test_windows_that_cannot_be_are_refused_in_one_line(tmp_path, learning, message):
    options = {"unit": "window", "batch_size": 4} | learning
    with pytest.raises(UsageError, match=message) as refused:
        calibrated(case(), Recipe.load("adaround").with_settings(keep="none", learning=options), tmp_path)
    assert "\n" not in str(refused.value)
