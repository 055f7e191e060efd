"""Roundings that are solved by second moments, not learned: what the engine collects for them and what it keeps."""

import copy

import pytest
import torch
from torch import nn

from dmquant.calib.blocks import decide
from dmquant.calib.blocks.budget import FITTED, SOLVING, Held, check_budget, passes
from dmquant.calib.blocks.learn import learn
from dmquant.calib.blocks.outputs import Outputs
from dmquant.calib.blocks.units import Block
from dmquant.calib.layers import moments
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import Moments, alike, fit_grid, moments_for
from dmquant.calib.objectives import UnitData, mse
from dmquant.convert import LayerPlan
from dmquant.errors import UserError
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Learning
from dmquant.rounding import get_method
from dmquant.rounding.base import Fixed
from tests.calib.runs import calibrated, captured, is_same, packed, quantized_layers, recipe_of, saved_and_loaded

GPTQ = {"rounding": "gptq", "scale": "mse", "activations": "fp6"}


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return captured("pixart-sigma", tmp_path_factory.mktemp("data"), blocks=2)


@pytest.fixture(scope="module")
def solved(pixart, tmp_path_factory):
    return calibrated(pixart, recipe_of(**GPTQ), tmp_path_factory.mktemp("solved"))


def test_blocks_are_solved_with_less_error_than_nearest(solved):
    for block in solved[1].blocks:
        for task in block["tasks"]:
            assert task["solved"]
            assert task["error"] < 0.9 * task["nearest_error"]


@pytest.mark.parametrize("largest", [1, 10])
def test_moments_are_collected_in_full_however_wide_the_layer(pixart, solved, tmp_path, monkeypatch, largest):
    monkeypatch.setattr(moments, "LARGEST", largest)
    assert is_same(calibrated(pixart, recipe_of(**GPTQ), tmp_path)[0], solved[0])


def test_a_small_budget_takes_more_passes_for_the_same_codes(pixart, solved, tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(
        decide, "passes", lambda sizes, budget: parts.extend([[name] for name in sizes]) or parts[-len(sizes) :]
    )
    assert is_same(calibrated(pixart, recipe_of(**GPTQ), tmp_path)[0], solved[0])
    assert len(parts) == len(quantized_layers(solved[0]))


def test_finished_blocks_are_read_back(pixart, solved, tmp_path):
    class StoppedError(Exception):
        pass

    def say(line):
        if "block 1" in line:
            raise StoppedError

    with pytest.raises(StoppedError):
        calibrated(pixart, recipe_of(**GPTQ), tmp_path, say=say)
    told = []
    assert is_same(calibrated(pixart, recipe_of(**GPTQ), tmp_path, say=told.append)[0], solved[0])
    assert sum("already there" in line for line in told) == 1


@pytest.mark.parametrize("model", ["sd15", "sana"])
def test_models_with_convolutions_are_solved_and_saved(model, tmp_path):
    case = captured(model, tmp_path / "data")
    backbone, done = calibrated(case, recipe_of(keep=False, **GPTQ), tmp_path / "out")
    assert any(task["solved"] for block in done.blocks for task in block["tasks"])
    assert is_same(saved_and_loaded(model, backbone, done.recipe, tmp_path / "saved"), backbone)
    assert packed(backbone)


def case_of(rounding, target):
    """One layer whose target is the output of any weight: what `learn` keeps follows from that alone."""
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    layer.weight.data = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec.parse("fp4", "channel")
    grid = fit_grid(layer.weight, LayerPlan("layer", spec, None), None)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    quantized = QUANTIZED[nn.Linear].like(layer, spec, None, device="meta")
    learner = Learner("layer", layer, grid, rounding(grid), quantized)
    data = UnitData(
        lambda batch, _: learner.forward(x[list(batch)]), lambda batch: x[list(batch)] @ target(grid).T, [0], [1, 2, 3]
    )
    return learner, learn("layer", [learner], mse.start(data, mse.Options()), Learning(), lambda step, loss: None)


def other(grid):
    return -grid.nearest


@pytest.mark.parametrize("better", [True, False])
def test_of_the_solved_roundings_and_nearest_those_better_on_held_out_data_are_kept(better):
    learner, (done, kept) = case_of(
        lambda grid: Fixed(grid, other(grid)), other if better else lambda grid: grid.weight
    )
    assert torch.equal(kept["layer"].values, learner.rounding.hard() if better else learner.grid.nearest)
    assert done.solved == better
    assert done.error == (0 if better else done.nearest_error)
    assert (done.best_step, done.undecided) == (0, 0.0)


@pytest.mark.parametrize(("method", "share"), [("gptq", "held out"), ("adaround", "all")])
def test_full_precision_is_carried_for_what_it_is_needed_for(pixart, tmp_path, monkeypatch, method, share):
    read, write = set(), Outputs.write

    def counted(outputs, indices, output):
        read.update(indices if len(outputs._places) < len(pixart[2]) or share == "all" else ())
        write(outputs, indices, output)

    monkeypatch.setattr(Outputs, "write", counted)
    calibrated(pixart, recipe_of(**GPTQ | {"rounding": method, "scale": "mse"}), tmp_path)
    held_out = {index for index, sample in enumerate(pixart[2].samples) if sample.held_out}
    assert read == (held_out if share == "held out" else set(range(len(pixart[2]))))


def test_inputs_that_are_not_finite_are_blamed_on_their_layer(pixart, tmp_path):
    """In samples to learn from, which are not carried in full precision."""
    backbone, blocks, store = copy.deepcopy(pixart[0]), *pixart[1:]
    learning = next(index for index, sample in enumerate(store.samples) if not sample.held_out)
    batch = store.batch

    class Damaged:
        def __getattr__(self, name):
            return getattr(store, name)

        def __len__(self):
            return len(store)

        def batch(self, indices, device="cpu"):
            args, kwargs = batch(indices, device)
            if learning in indices and len(indices) > 1:
                kwargs["hidden_states"] = kwargs["hidden_states"] * float("nan")
            return args, kwargs

    with pytest.raises(UserError, match=r"the input of layer transformer_blocks\.0\.attn1\.to_q holds NaN or infinity"):
        calibrated((backbone, blocks, Damaged()), recipe_of(**GPTQ), tmp_path)


def test_every_row_of_a_batch_weighs_the_same():
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    x[1] = 0
    found = alike(x)
    mean_square = found.square().flatten(1).mean(1)
    assert torch.allclose(mean_square, torch.tensor([1.0, 0, 1, 1, 1]), rtol=1e-5)
    assert torch.allclose(found[4] * x[4].square().mean().sqrt(), x[4], rtol=1e-5)
    assert torch.isfinite(alike(x.half())).all()


def test_moments_in_the_order_of_a_split_convolutions_codes():
    generator, shape = torch.Generator().manual_seed(0), (1, 10, 3, 2)
    spec = WeightSpec.parse("fp4", "group:16", split=7)
    x, collected = torch.randn(50, 60, generator=generator), Moments(shape, spec, torch.device("cpu"), together=25)
    collected.add(x)
    positions = x.view(50, 6, 10)
    expected = torch.cat([positions[..., :7].flatten(1), positions[..., 7:].flatten(1)], 1)
    blocks = collected.blocks()
    assert [len(block) for block in blocks] == [32, 28]  # whole groups of 16, and no more than two blocks
    for block, part in zip(blocks, expected.split([32, 28], 1), strict=True):
        assert torch.allclose(block, part.T @ part, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "in_full"),
    [
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 3, padding=1), True),
        (nn.Conv2d(4, 4, 3, groups=2), None),
        (nn.Conv2d(4, 4, 3, padding="same"), None),
    ],
)
def test_what_has_no_one_matrix_of_moments_is_left_to_nearest(layer, in_full):
    method, plan = get_method("gptq"), LayerPlan("x", WeightSpec.parse("fp4"), None)
    found = moments_for(layer, plan, method, method.Options(), torch.device("cpu"))
    assert (found and found.in_full) == in_full


def test_layers_are_collected_together_as_far_as_the_budget_goes():
    sizes = {"a": Held(100, 100), "b": Held(100, 100), "c": Held(10, 10), "d": Held(0, 0), "e": Held(600, 300)}
    alone = 600 + 300 + SOLVING * 300  # with the factor of the other block
    assert passes(sizes, alone + 210) == [["a", "b", "c", "d", "e"]]
    assert passes(sizes, alone) == [["a", "b", "c", "d"], ["e"]]
    assert passes(sizes, (1 + SOLVING) * 100) == [["a"], ["b"], ["c", "d"], ["e"]]
    for budget in range(0, 4000, 100):
        parts = passes(sizes, budget)
        assert [name for part in parts for name in part] == list(sizes)
        for part in parts:
            held = [sizes[name] for name in part]
            solving = max(each.moments - each.block + SOLVING * each.block for each in held)
            assert len(part) == 1 or sum(each.moments for each in held) + solving <= budget


def test_the_budget_has_to_hold_the_moments_of_the_widest_layer():
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 8)))
    blocks = [Block("0", ("0.0",), False, torch.zeros(2, 8), 1, 0, 0)]
    size = 4 * 32 * 32
    needed = check_budget(1 << 30, model, blocks, Learning(batch_size=1), False, {"0.0": Held(size, size)})
    assert needed == FITTED * 32 * 8 + 2 * 2 * 8 * 4 + (1 + SOLVING) * size
