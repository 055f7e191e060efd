"""All layers learned at once: from what, by what error, and that a kill or little memory changes nothing."""

import copy

import pytest

from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.whole.teacher import Teacher
from dmquant.errors import UsageError
from tests.calib.runs import calibrated, captured, has_same_state, is_same, recipe_of

GPTQ = {"method": "gptq", "damping": 0.1}
LEARNING = {"unit": "model", "iterations": 6, "batch_size": 4, "checks": 2, "checkpoint_every": 2}
METHODS = {
    "flexround": ({"method": "flexround", "begin": GPTQ}, 0.003),
    "discquant": ({"method": "discquant", "start": "random"}, 0.1),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return captured("pixart-sigma", tmp_path_factory.mktemp("data"))


def recipe(method, **changes):
    rounding, rate = METHODS[method]
    return recipe_of(rounding=rounding, learning=LEARNING | {"learning_rate": rate} | changes)


@pytest.fixture(scope="module")
def learned(case, tmp_path_factory):
    """What FlexRound makes of the backbone, and what was told."""
    told = []
    backbone, done = calibrated(case, recipe("flexround"), tmp_path_factory.mktemp("learned"), say=told.append)
    return backbone, done, told


def held_out_error(case, backbone, folder):
    """The mean squared error of a backbone's predictions, by a teacher of its own."""
    store = case[-1]
    held_out = [index for index, sample in enumerate(store.samples) if sample.held_out]
    teacher = Teacher(copy.deepcopy(case[0]), store, held_out, Budget(1 << 30, folder), batch_size=4)
    teacher.backbone = backbone
    return teacher.error(held_out).item()


def test_without_a_step_it_is_what_the_march_decides_alone(case, tmp_path):
    alone, _ = calibrated(case, recipe_of(rounding=GPTQ, learning={"batch_size": 4}), tmp_path / "alone")
    backbone, done = calibrated(case, recipe("flexround", iterations=0), tmp_path / "whole")
    assert has_same_state(backbone, alone)
    assert done.blocks[-1]["tasks"][0]["solved"]


def test_the_error_told_is_that_of_the_model_and_less_than_what_it_began_with(case, learned, tmp_path):
    backbone, done, told = learned
    task = done.blocks[-1]["tasks"][0]
    assert task["error"] == pytest.approx(held_out_error(case, backbone, tmp_path), rel=1e-3)
    begun, _ = calibrated(case, recipe("flexround", iterations=0), tmp_path / "begun")
    assert task["error"] < 0.8 * held_out_error(case, begun, tmp_path)
    assert any("about" in line and "of it for weights" in line for line in told)
    assert any(line.startswith("all layers: step 4 of 6") and "to go" in line for line in told)
    errors = {layer.plan.name: layer.error for layer in done.layers}
    layer = "transformer_blocks.1.ff.net.2"
    exact, quantized = (one.get_submodule(layer) for one in (case[0], backbone))
    difference = quantized.float_weight() - exact.weight
    expected = difference.square().sum() / exact.weight.square().sum()
    assert errors[layer] == pytest.approx(expected.item(), rel=1e-3)


def test_a_killed_learning_goes_on_to_the_same_bytes(case, learned, tmp_path):
    def stop(line):
        if line.startswith("all layers: step 4"):
            raise KeyboardInterrupt

    once, done, _ = learned
    with pytest.raises(KeyboardInterrupt):
        calibrated(case, recipe("flexround"), tmp_path, say=stop)
    told = []
    backbone, again = calibrated(case, recipe("flexround"), tmp_path, say=told.append)
    assert not any("step 2" in line or "step 4" in line for line in told)
    assert is_same(backbone, once)
    assert again.blocks[-1]["tasks"] == done.blocks[-1]["tasks"]
    told.clear()
    backbone, again = calibrated(case, recipe("flexround"), tmp_path, say=told.append)
    assert told[-1] == "all layers: already there"
    assert is_same(backbone, once)
    assert [layer.error for layer in again.layers] == [layer.error for layer in done.layers]


def test_a_method_that_begins_at_random_ends_no_further_than_nearest_rounding(case, tmp_path):
    backbone, done = calibrated(case, recipe("discquant"), tmp_path / "learned")
    task = done.blocks[-1]["tasks"][0]
    assert task["error"] <= task["nearest_error"]
    assert task["error"] == pytest.approx(held_out_error(case, backbone, tmp_path), rel=1e-3)
    assert 0 < task["undecided"] < 1


def test_what_learning_begins_with_is_made_anew_where_its_file_is_damaged(case, learned, tmp_path):
    def stop(line):
        if line.startswith("all layers: step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(case, recipe("flexround"), tmp_path, say=stop)
    file = tmp_path / "whole" / "001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    told = []
    backbone, _ = calibrated(case, recipe("flexround"), tmp_path, say=told.append)
    assert ["already there" in line for line in told[1:4]] == [True, False, True]
    assert is_same(backbone, learned[0])


def test_where_memory_is_short_activations_are_computed_again_or_it_is_told_what_fits(case, learned, tmp_path):
    told = []
    with pytest.raises(UsageError, match="too small to learn all layers at once") as caught:
        calibrated(case, recipe("flexround"), tmp_path, memory_budget=7_000_000)
    least = str(caught.value).split("--memory-budget ")[1].split()[0]
    assert "or learning.batch_size: 2" in str(caught.value)
    budget = round(float(least.removesuffix("MB")) * 1e6)
    backbone, _ = calibrated(case, recipe("flexround"), tmp_path, memory_budget=budget, say=told.append)
    assert "compute their activations twice" in told[0]
    assert is_same(backbone, learned[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "homologous"}, "homologous compares a block with itself"),
        ({"objective": "sampler"}, "captured without"),
        ({"activation_drop": 0.5}, "are of blocks"),
    ],
)
def test_what_only_blocks_have_is_refused(case, changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        calibrated(case, recipe("flexround", **changes), tmp_path)
