"""The rest of a network behind a unit: what it predicts, what that is worth, and what is said where there is none."""

import pytest
import torch
from torch import nn

from dmquant.activations import TimestepRanges
from dmquant.calib.blocks.budget import check_budget
from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.blocks.prediction import prediction_of
from dmquant.calib.blocks.streams import Streams
from dmquant.calib.blocks.trace import trace
from dmquant.calib.blocks.units import Block, find_blocks
from dmquant.calib.data.sampling import Sample
from dmquant.calib.layers.learner import PRODUCTS
from dmquant.errors import UsageError, UserError
from dmquant.recipe import Learning
from tests.calib.runs import calibrated, captured, is_same, recipe_of

SAMPLES, TOKENS, WIDTH = 64, 8, 32
BATCH = [0, 9, 33]


class Toy(nn.Module):
    """Two blocks; the second multiplies one direction of the first's output by `gain`."""

    def __init__(self, gain=1.0, returned=lambda sample: (sample,)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(2))
        for block in self.blocks:
            block[0].weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
        stretched = torch.eye(WIDTH) + (gain - 1) * torch.outer(direction, direction)
        self.blocks[1][0].weight.data = self.blocks[1][0].weight.data @ stretched
        self.returned = returned

    def forward(self, sample, timestep):
        for block in self.blocks:
            sample = block(sample)
        return self.returned(sample)


class InMemory:
    """Stands for a CalibrationStore."""

    def __init__(self, weights=None):
        self.inputs = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
        self.samples = [Sample(index, 0, index % 4 == 0) for index in range(SAMPLES)]
        self.timesteps, self.rows, self.key, self.weights = [500.0], 1, "toy", weights

    def batch(self, indices, device="cpu"):
        return (), {"sample": self.inputs[list(indices)], "timestep": torch.full((len(indices),), 500.0)}


def case_of(**settings):
    return Toy(**settings), ["blocks.0", "blocks.1"], InMemory()


def learned_by(objective, case, folder, **learning):
    """First block alone quantized, to INT3; the backbone and the relative errors of both blocks' outputs."""
    recipe = recipe_of(
        weights="int3",
        granularity="channel",
        rules=[{"match": "blocks.1.*", "keep": True}],
        learning={"iterations": 120, "batch_size": 16, "checks": 2, "objective": objective} | learning,
    )
    backbone, done = calibrated(case, recipe, folder)
    held_out = [index for index, sample in enumerate(case[2].samples) if sample.held_out]
    x = case[2].inputs[held_out]
    errors = []
    with torch.no_grad():
        for depth in (1, 2):
            own, exact = (nn.Sequential(*one.blocks[:depth])(x) for one in (backbone, case[0]))
            errors.append(((own - exact).square().mean() / exact.square().mean()).item())
    return backbone, errors, done


PREDICTION = {"method": "prediction", "weight": 10.0, "every": 2}


def test_a_tail_that_stretches_a_direction_is_met_at_the_price_of_the_blocks_error(tmp_path):
    """Nearly half of the prediction's error goes, and the block's grows."""
    case = case_of(gain=50.0)
    _, (plain_block, plain), _ = learned_by("mse", case, tmp_path / "mse")
    _, (block, by_prediction), _ = learned_by(PREDICTION, case, tmp_path / "prediction")
    assert by_prediction < 0.6 * plain
    assert block > 1.05 * plain_block


def test_without_weight_the_codes_and_errors_are_those_of_the_plain_error(tmp_path):
    case = case_of()
    (plain, _, done), (other, _, its) = (
        learned_by(objective, case, tmp_path / str(number), iterations=6)
        for number, objective in enumerate(["mse", PREDICTION | {"weight": 0}])
    )
    assert is_same(plain, other)
    assert its.blocks[0]["tasks"] == done.blocks[0]["tasks"]


@pytest.mark.parametrize("objective", [PREDICTION, {"method": "fisher"}])
def test_they_repeat_bit_for_bit_and_differ_from_the_plain_error(tmp_path, objective):
    case = case_of(gain=4.0)
    first, again, plain = (
        learned_by(one, case, tmp_path / str(number), iterations=6)[0]
        for number, one in enumerate([objective, objective, "mse"])
    )
    assert is_same(first, again)
    assert not is_same(first, plain)


def streams_of(backbone, store):
    names = ["blocks.0", "blocks.1"]
    layers = [f"{name}.0" for name in names]
    backbone.requires_grad_(False)
    blocks = find_blocks(names, layers, lambda names: trace(backbone, store.batch([0]), names))
    learning, samples = Learning(batch_size=4), range(SAMPLES)
    return Streams(backbone, blocks, store, TimestepRanges(()), Budget(1 << 30, None), learning, samples)


def silent(*args):
    pass


def test_predictions_are_those_of_the_backbone_and_gradients_of_the_last_block_its_outputs_own():
    backbone, store = Toy(gain=3.0), InMemory()
    streams, (_, arguments) = streams_of(backbone, store), store.batch(BATCH)
    streams.predictions = streams.predict_in_full("all", silent)
    with torch.no_grad():
        assert torch.equal(streams.predictions.read(BATCH, torch.device("cpu")), backbone(**arguments)[0])
    for number in (0, 1):
        streams.carry(streams.quantized, number, "", silent)
        streams.carry(streams.full, number, "", silent)
    weight = backbone.blocks[1][0].weight
    weight.requires_grad_()
    output, prediction = streams.predict(1, "blocks.1", BATCH)
    assert torch.equal(output, prediction)
    target = torch.zeros_like(prediction)
    [by_prediction] = torch.autograd.grad((prediction - target).square().mean(), weight)
    [by_output] = torch.autograd.grad(
        (streams.run(streams.quantized, 1, "blocks.1", BATCH) - target).square().mean(), weight
    )
    assert torch.equal(by_prediction, by_output)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda sample: {"sample": sample}, r"the backbone returns no prediction but dict: learn without it, by "),
        (lambda sample: ("text",), r"the backbone returns no prediction but str: .*learning\.objective: mse"),
        (lambda sample: (sample.detach(),), r"no gradient goes from the backbone's prediction to blocks\.0: "),
    ],
)
def test_a_backbone_without_a_tail_that_can_be_learned_by_is_named_in_one_line(tmp_path, returned, said):
    with pytest.raises(UserError, match=said) as caught:
        learned_by(PREDICTION, case_of(returned=returned), tmp_path)
    assert "\n" not in str(caught.value)


def test_data_without_the_importance_of_steps_is_refused_and_with_it_taken(tmp_path):
    case = case_of()
    with pytest.raises(UsageError, match=r"weighs steps by their importance, which this calibration data was captured"):
        learned_by("sampler", case, tmp_path / "without")
    weighted = (*case[:2], InMemory(weights=[0.3]))
    one, _, _ = learned_by("sampler", weighted, tmp_path / "with", iterations=6)
    plain, _, _ = learned_by({"method": "mse", "rows": "relative"}, case, tmp_path / "plain", iterations=6)
    assert is_same(one, plain)  # one step: its weight is 1


def test_only_channels_that_the_sampler_reads_are_predicted():
    latents, both = torch.zeros(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    found = prediction_of((both,), ((), {"timestep": torch.zeros(2), "hidden_states": latents}))
    assert torch.equal(found, both[:, :4])
    assert prediction_of(both, ((), {"hidden_states": torch.zeros(2, 8, 4, 4)})) is both


def test_the_tail_counts_in_the_budget():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)))
    blocks = [
        Block(f"{n}", (f"{n}.0",), False, torch.zeros(2, 8), n + 1, saved, 16) for n, saved in enumerate((5, 70, 900))
    ]
    learning = Learning(batch_size=4)
    plain, tail = (check_budget(1 << 30, model, blocks[:count], learning, True, tail=False) for count in (1, 3))
    with_tail = check_budget(1 << 30, model, blocks, learning, True, tail=True)
    assert with_tail - plain == 2 * 4 * (70 + 900)
    assert tail < with_tail


@pytest.mark.parametrize(("share", "between"), [(0.5, True), (1.0, False)])
def test_dropped_inputs_are_not_quantized_in_learning_and_always_are_when_judged(tmp_path, monkeypatch, share, between):
    seen, product = [], PRODUCTS[nn.Linear]

    def watch(x, learner):
        quantized = (learner.quantize_input(x) == learner.quantized.quantize_input(x.detach())).float().mean().item()
        seen.append((learner.drawing is not None, quantized))
        return product(x, learner)

    monkeypatch.setitem(PRODUCTS, nn.Linear, watch)
    rules = [{"match": "blocks.1.*", "keep": True}]
    recipe = recipe_of(rules, activations="fp4", learning={"activation_drop": share, "iterations": 4})
    calibrated(case_of(), recipe, tmp_path)
    learning = [quantized for is_drawn, quantized in seen if is_drawn]
    assert all(quantized == 1 for is_drawn, quantized in seen if not is_drawn)
    assert len(learning) == 4
    assert all((0.4 < quantized < 0.75) == between for quantized in learning)
    assert all(quantized < 0.75 for quantized in learning)


@pytest.mark.parametrize("model", ["sd15", "flux"])
def test_tails_with_skip_connections_and_of_blocks_that_give_several_tensors_are_learned_through(tmp_path, model):
    case = captured(model, tmp_path / "data")
    first, *_, last = case[1]
    rules = [{"match": "*", "keep": True}, {"match": [f"{first}.*", f"{last}.*"], "keep": False}]
    learning = {"iterations": 6, "full_precision_inputs": 0.5, "activation_drop": 0.5, "distribution_steps": 2}
    for objective in (PREDICTION, {"method": "fisher", "samples": 2}):
        recipe = recipe_of(rules, keep=False, activations="fp6", learning=learning | {"objective": objective})
        _, done = calibrated(case, recipe, tmp_path / objective["method"])
        assert [block["name"] for block in done.blocks] == [first, last]
        assert all(0 < task["error"] <= task["nearest_error"] for block in done.blocks for task in block["tasks"])
