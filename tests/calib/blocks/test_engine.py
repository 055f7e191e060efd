"""The engine: it makes what the recipe says, repeats bit for bit, survives being stopped, and fits its budget."""

import contextlib
import copy
import math
import signal
import sys

import pytest
import torch
from torch import nn

from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.data.sampling import Sample
from dmquant.calib.data.store import CalibrationStore
from dmquant.convert import plan, quantize_
from dmquant.cpu.compiling import missing_to_compile
from dmquant.errors import UsageError, UserError
from dmquant.pipelines.runs.bounds import parse_size
from tests.calib.runs import calibrated, captured, is_same, packed, quantized_layers, recipe_of, saved_and_loaded
from tests.forked import Forked
from tests.tiny import TINY

CANDIDATES = ["fp4_e2m1", "fp4_e1m2", "fp4_e3m0"]
PATIENCE = 300  # seconds for a process to calibrate on a busy machine


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return captured("pixart-sigma", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(pixart, tmp_path_factory):
    """Calibrated by the plain recipe, uninterrupted, with all the memory it wants."""
    return calibrated(pixart, recipe_of(), tmp_path_factory.mktemp("reference"))


def held_out_error(case, backbone):
    """Of the backbone's output, over the samples that nothing was learned from."""
    exact, _, store = case
    _, kwargs = store.batch([index for index, sample in enumerate(store.samples) if sample.held_out])
    with torch.no_grad():
        return (backbone(**kwargs)[0] - exact(**kwargs)[0]).square().mean().item()


def test_every_planned_layer_is_quantized_and_reported(pixart, reference):
    backbone, done = reference
    planned = [step.name for step in plan(pixart[0], recipe_of())]
    assert sorted(layer.plan.name for layer in done.layers) == sorted(planned)
    assert {name.rpartition(".")[0] for name in packed(backbone)} == set(planned)
    assert done.recipe == recipe_of()
    assert [block["name"] for block in done.blocks] == [f"transformer_blocks.{number}" for number in range(3)]
    for block in done.blocks:
        (task,) = block["tasks"]
        assert 0 < task["error"] <= task["nearest_error"]
        assert set(block["formats"].values()) == {"fp4_e2m1"}


def test_learning_gains_on_nearest_rounding_where_nothing_was_learned(pixart, tmp_path):
    recipe = recipe_of(learning={"iterations": 100})
    backbone, done = calibrated(pixart, recipe, tmp_path)
    nearest = copy.deepcopy(pixart[0])
    quantize_(nearest, recipe.with_settings(rounding="nearest"))
    assert held_out_error(pixart, backbone) < 0.9 * held_out_error(pixart, nearest)
    for block in done.blocks:
        assert block["tasks"][0]["error"] < 0.9 * block["tasks"][0]["nearest_error"]


def test_a_block_whose_learning_diverges_is_told_and_the_next_one_follows(pixart, tmp_path):
    few = [{"match": "*", "keep": True}, {"match": "transformer_blocks.[01].ff.net.2", "keep": False}]
    told, recipe = (
        [],
        recipe_of(few, rounding={"method": "flexround"}, learning={"learning_rate": 1e4, "iterations": 30}),
    )
    _, done = calibrated(pixart, recipe, tmp_path, say=told.append)
    task = done.blocks[0]["tasks"][0]
    assert task["diverged"] in (10, 20, 30)
    assert task["error"] <= task["nearest_error"]
    step = f"transformer_blocks.0 at step {task['diverged']}"
    assert len(told) == 2
    assert told[0].endswith(f"; learning diverged ({step}) and its best was kept: lower learning.learning_rate")


def test_codes_are_neighbours_of_the_weights(pixart, reference):
    for name, quantized in quantized_layers(reference[0]).items():
        exact = pixart[0].get_submodule(name)
        scale = quantized.scales.decode().repeat_interleave(16, 1)[:, : exact.weight.shape[1]]
        lower, upper = quantized.weight_spec.fmt.neighbours(exact.weight / scale)
        codes = quantized.dequantize(torch.float32) / scale
        assert ((codes - lower).abs() < 1e-5).logical_or((codes - upper).abs() < 1e-5).all()


def test_nearest_rounding_through_the_engine_is_data_free_rounding(pixart, tmp_path):
    recipe = recipe_of(rounding="nearest")
    backbone, _ = calibrated(pixart, recipe, tmp_path)
    data_free = copy.deepcopy(pixart[0])
    quantize_(data_free, recipe)
    for name, layer in quantized_layers(backbone).items():  # codes may tell zeros of different sign apart
        assert torch.equal(layer.dequantize(torch.float32), data_free.get_submodule(name).dequantize(torch.float32))
        assert torch.equal(layer.scale, data_free.get_submodule(name).scale)


def test_it_repeats_bit_for_bit_and_follows_its_seed(pixart, reference, tmp_path):
    assert is_same(calibrated(pixart, recipe_of(), tmp_path / "again")[0], reference[0])
    other = recipe_of(learning={"seed": 1})
    assert not is_same(calibrated(pixart, other, tmp_path / "other")[0], reference[0])


def least_budget(case, folder):
    with pytest.raises(UsageError, match=r"--memory-budget [\d.]+\w*B or more") as caught:
        calibrated(case, recipe_of(), folder, memory_budget=1)
    assert "transformer_blocks." in str(caught.value)
    assert "\n" not in str(caught.value)
    return parse_size(str(caught.value).split("--memory-budget ")[1].split()[0], "--memory-budget")


def test_a_budget_too_small_names_the_least_and_with_that_it_spills_to_the_same_codes(
    pixart, reference, tmp_path, monkeypatch
):
    """The least is in whole megabytes, in which these outputs would fit: they are sent to disk all the same."""
    least = least_budget(pixart, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr("dmquant.calib.blocks.engine.Budget", lambda total, spill: Budget(0, spill))
    backbone, _ = calibrated(pixart, recipe_of(), tmp_path / "spilled", memory_budget=least)
    assert (tmp_path / "spilled" / "spill").is_dir()
    assert list((tmp_path / "spilled" / "spill").iterdir()) == []
    assert is_same(backbone, reference[0])


def stop_after(blocks):
    told = []

    def say(line):
        told.append(line)
        if len(told) == blocks:
            raise KeyboardInterrupt

    return say


def test_interrupted_and_run_again_it_gives_the_codes_of_an_uninterrupted_run(pixart, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        calibrated(pixart, recipe_of(), tmp_path, say=stop_after(1))
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {"000.json", "000.safetensors"}
    told = []
    backbone, done = calibrated(pixart, recipe_of(), tmp_path, say=told.append)
    assert ["already there" in line for line in told] == [True, False, False]
    assert is_same(backbone, reference[0])
    assert [layer.plan for layer in done.layers] == [layer.plan for layer in reference[1].layers]
    assert [layer.error for layer in done.layers] == [layer.error for layer in reference[1].layers]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_codes_are_learned_again(pixart, reference, tmp_path, damage):
    calibrated(pixart, recipe_of(), tmp_path)
    path = tmp_path / "blocks" / "001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[-10] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-10])
    told = []
    backbone, _ = calibrated(pixart, recipe_of(), tmp_path, say=told.append)
    assert ["already there" in line for line in told] == [True, False, True]
    assert is_same(backbone, reference[0])


@pytest.mark.parametrize("changed", ["recipe", "model"])
def test_codes_of_another_recipe_or_model_are_not_taken(pixart, tmp_path, changed):
    calibrated(pixart, recipe_of(), tmp_path)
    told, recipe = [], recipe_of(learning={"iterations": 13} if changed == "recipe" else {})
    made_for = {"weights": "w" if changed == "recipe" else "other"}
    calibrated(pixart, recipe, tmp_path, say=told.append, made_for=made_for)
    assert not any("already there" in line for line in told)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.calib.runs import calibrated, captured, recipe_of
from dmquant.calib.blocks import decide
learned = []
def killing(step, loss):
    if len(learned) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
def learn(unit, learners, data, options, report, learn=decide.learn):
    learned.append(unit)
    return learn(unit, learners, data, options, killing)
decide.learn = learn
calibrated(captured("pixart-sigma", Path(sys.argv[1])), recipe_of(), Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_in_the_middle_of_a_block_and_run_again_it_gives_the_same_codes(pixart, reference, tmp_path):
    assert Forked(["-c", SCRIPT, tmp_path / "data", tmp_path / "codes"]).wait(PATIENCE) == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "codes" / "blocks").iterdir()} == {"000.json", "000.safetensors"}
    told = []
    case = (pixart[0], pixart[1], CalibrationStore.open(tmp_path / "data"))
    backbone, _ = calibrated(case, recipe_of(), tmp_path / "codes", say=told.append)
    assert ["already there" in line for line in told] == [True, False, False]
    assert is_same(backbone, reference[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("unit", ["layer", "block", "window"])
def test_all_units_and_dtypes_gain_on_nearest_rounding_with_layers_outside_of_blocks(pixart, tmp_path, unit, dtype):
    recipe = recipe_of(
        keep=False,
        activations="fp8",
        learning={"unit": unit, "dtype": dtype, "iterations": 10 if unit == "layer" else 20},
    )
    backbone, done = calibrated(pixart, recipe, tmp_path)
    assert {step.name for step in plan(pixart[0], recipe)} == {name.rpartition(".")[0] for name in packed(backbone)}
    assert {"pos_embed.proj", "proj_out", "transformer_blocks.2"} <= {block["name"] for block in done.blocks}
    assert all(parameter.dtype != torch.bfloat16 for parameter in backbone.parameters())
    nearest = copy.deepcopy(pixart[0])
    quantize_(nearest, recipe.with_settings(rounding="nearest"))
    assert held_out_error(pixart, backbone) < held_out_error(pixart, nearest)


@pytest.mark.parametrize(
    "learning",
    [{"full_precision_inputs": 0.5}, {"full_precision_inputs": 1.0}, {"quantize_activations": False}],
)
def test_choices_of_learning_change_the_codes_and_repeat(pixart, reference, tmp_path, learning):
    recipe = recipe_of(learning=learning, activations="fp6")
    first, _ = calibrated(pixart, recipe, tmp_path / "first")
    again, _ = calibrated(pixart, recipe, tmp_path / "again")
    plain, _ = calibrated(pixart, recipe_of(activations="fp6"), tmp_path / "plain")
    assert is_same(first, again)
    assert not is_same(first, plain)


def test_formats_are_chosen_by_output_error_and_the_resolved_recipe_rebuilds_the_model(pixart, tmp_path):
    exact = copy.deepcopy(pixart[0])
    spread = exact.transformer_blocks[1].ff.net[2].weight
    spread.data = spread.sign() * torch.exp2(-10 * torch.rand(spread.shape, generator=torch.Generator().manual_seed(0)))
    recipe = recipe_of(candidates=CANDIDATES, scale="hessian", activations="fp8")
    backbone, done = calibrated((exact, *pixart[1:]), recipe, tmp_path / "codes")
    formats = {layer.plan.name: layer.plan.weights.fmt.name for layer in done.layers}
    assert set(formats.values()) <= set(CANDIDATES)
    assert len(set(formats.values())) > 1
    resolved = {
        step.name: step.weights.fmt.name for step in plan(TINY["pixart-sigma"].build().transformer, done.recipe)
    }
    assert resolved == formats
    assert not done.recipe.candidates
    loaded = saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved")
    assert is_same(loaded, backbone)
    _, kwargs = pixart[2].batch([0])
    with torch.no_grad():
        assert torch.equal(loaded(**kwargs)[0], backbone(**kwargs)[0])


def test_the_format_chosen_is_the_one_of_least_error_of_the_layers_output(pixart, tmp_path):
    """The first layer of the first block meets the same inputs in full precision and in the quantized stream."""
    first = "transformer_blocks.0.attn1.to_q"
    backbone, _, store = pixart
    keep_others = {"match": "*", "keep": True}, {"match": first, "keep": False}
    inputs = []
    handle = backbone.get_submodule(first).register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    learning = [index for index, sample in enumerate(store.samples) if not sample.held_out]
    with torch.no_grad():
        backbone(**store.batch(learning)[1])
    handle.remove()
    errors = {}
    for name in CANDIDATES:
        recipe = recipe_of(rules=keep_others, weights=name, rounding="nearest")
        alone = copy.deepcopy(backbone)
        quantize_(alone, recipe)
        difference = alone.get_submodule(first)(inputs[0]) - backbone.get_submodule(first)(inputs[0])
        errors[name] = difference.square().mean().item()
    recipe = recipe_of(rules=keep_others, candidates=CANDIDATES, rounding="nearest")
    _, done = calibrated(pixart, recipe, tmp_path)
    assert [layer.plan.weights.fmt.name for layer in done.layers] == [min(errors, key=errors.get)]


OUTPUT_ALONE = [{"match": "*", "keep": True}, {"match": "proj_out", "keep": False}]
COUNTED = torch.arange(32) % 8 < 4  # a pixel's noise, and not the variance behind it


def test_channels_that_do_not_count_are_left_at_nearest_rounding(pixart, tmp_path):
    recipe = recipe_of(rules=OUTPUT_ALONE, learning={"iterations": 60, "learning_rate": 0.05})
    learned, _ = calibrated(pixart, recipe, tmp_path, counted={"proj_out": COUNTED})
    nearest = copy.deepcopy(pixart[0])
    quantize_(nearest, recipe.with_settings(rounding="nearest"))
    differs = learned.proj_out.dequantize(torch.float32) != nearest.proj_out.dequantize(torch.float32)
    assert differs[COUNTED].any()
    assert not differs[~COUNTED].any()


def test_the_error_of_an_output_layer_is_that_of_the_channels_that_count(pixart, tmp_path):
    backbone, _, store = pixart
    recipe = recipe_of(rules=OUTPUT_ALONE, rounding="nearest")
    quantized, done = calibrated(pixart, recipe, tmp_path / "counted", counted={"proj_out": COUNTED})
    _, whole = calibrated(pixart, recipe, tmp_path / "whole")
    inputs = []
    handle = backbone.proj_out.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    with torch.no_grad():
        backbone(**store.batch([index for index, sample in enumerate(store.samples) if sample.held_out])[1])
    handle.remove()
    with torch.no_grad():
        squared = (quantized.proj_out(inputs[0]) - backbone.proj_out(inputs[0])).square()
    (counted,), (all_channels,) = done.blocks[0]["tasks"], whole.blocks[0]["tasks"]
    assert counted["error"] == pytest.approx(squared[..., COUNTED].mean().item(), rel=1e-4)
    assert all_channels["error"] == pytest.approx(squared.mean().item(), rel=1e-4)
    assert counted["error"] != pytest.approx(all_channels["error"], rel=1e-2)


def test_static_activations_are_calibrated_and_survive_saving(pixart, tmp_path):
    recipe = recipe_of(activations="fp8", activation_scale="static:4", activation_granularity="tensor")
    backbone, done = calibrated(pixart, recipe, tmp_path)
    scales = [tensor for name, tensor in packed(backbone).items() if name.endswith("input_scale")]
    assert len(scales) == len(done.layers)
    loaded = saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved")
    _, kwargs = pixart[2].batch([0, 7])
    with torch.no_grad():
        output = backbone(**kwargs)[0]
        exact = pixart[0](**kwargs)[0]
    assert (output - exact).square().mean() < 0.5 * exact.var()
    with torch.no_grad():
        assert torch.equal(loaded(**kwargs)[0], output)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_stops_with_the_layers_name_and_what_is_finished_stays(pixart, tmp_path, bad):
    backbone = copy.deepcopy(pixart[0])
    backbone.transformer_blocks[1].attn2.to_k.weight.data[3, 2] = bad
    with pytest.raises(UserError, match=r"layer transformer_blocks\.1\.attn2\.to_k gives NaN or infinity"):
        calibrated((backbone, *pixart[1:]), recipe_of(), tmp_path)
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {"000.json", "000.safetensors"}


def test_activations_that_overflow_stop_with_the_layers_name(pixart, tmp_path):
    backbone = copy.deepcopy(pixart[0])
    feed_forward = backbone.transformer_blocks[0].ff.net
    feed_forward[0].proj.weight.data *= 1e25
    feed_forward[2].weight.data *= 1e25
    with pytest.raises(UserError, match=r"layer transformer_blocks\.0\.ff\.net\.2 gives NaN or infinity"):
        calibrated((backbone, *pixart[1:]), recipe_of(), tmp_path)


def test_too_few_samples_for_the_batch_and_nothing_to_quantize_are_said_before_any_work(pixart, tmp_path):
    with pytest.raises(UsageError, match=r"12 samples to learn from, fewer than a mini-batch of 13: calibrate on more"):
        calibrated(pixart, recipe_of(learning={"batch_size": 13}), tmp_path)
    nothing = recipe_of(rules=[{"match": "*", "keep": True}])
    with pytest.raises(UsageError, match="quantizes none of the layers of PixArtTransformer2DModel"):
        calibrated(pixart, nothing, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_the_block_the_loss_and_the_time_to_go(pixart, tmp_path):
    titles, calls, told = [], [], []

    def bar(title):
        titles.append(title)
        return contextlib.nullcontext(lambda *args: calls.append(args))

    calibrated(pixart, recipe_of(), tmp_path, bar=bar, say=told.append)
    assert titles == [f"block {number} of 3: transformer_blocks.{number - 1}" for number in (1, 2, 3)]
    assert any(len(call) == 4 and call[3].startswith("loss ") for call in calls)
    assert all(0 <= call[0] <= call[1] for call in calls)
    assert "s to go" in told[0]
    assert "to go" not in told[2]


class TwoBlocks(nn.Module):
    """The second block's inputs are few directions, which its rounding can set right after the first block's error."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
        for block in self.blocks:
            block[0].weight.data = torch.randn(32, 32, generator=generator) / 32**0.5

    def forward(self, sample, timestep):
        for block in self.blocks:
            sample = block(sample)
        return (sample,)


class InMemory:
    """Stands for a CalibrationStore: inputs of four directions."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        directions = torch.randn(4, 32, generator=generator)
        self.inputs = torch.randn(64, 16, 4, generator=generator) @ directions
        self.samples = [Sample(index, 0, index % 4 == 0) for index in range(64)]
        self.timesteps, self.rows, self.key = [500.0], 1, "toy"

    def batch(self, indices, device="cpu"):
        return (), {"sample": self.inputs[list(indices)], "timestep": torch.full((len(indices),), 500.0)}


def test_carrying_the_quantized_stream_beats_learning_each_block_on_full_precision(tmp_path):
    exact, store = TwoBlocks(), InMemory()
    case = (exact, ["blocks.0", "blocks.1"], store)

    def final_error(full_precision_inputs):
        recipe = recipe_of(
            weights="int4",
            granularity="channel",
            rules=[{"match": "blocks.0.*", "weights": "int2"}],
            learning={
                "iterations": 150,
                "batch_size": 8,
                "checks": 3,
                "full_precision_inputs": full_precision_inputs,
            },
        )
        backbone, done = calibrated(case, recipe, tmp_path / str(full_precision_inputs))
        return held_out_error(case, backbone), done.blocks[0]["tasks"][0]["error"]

    (carried, first), (apart, same) = final_error(0.0), final_error(1.0)
    assert first == same  # the first block has no blocks before it
    assert carried < 0.2 * apart


@pytest.mark.slow
@pytest.mark.skipif(missing_to_compile(), reason="torch.compile needs a C++ compiler and Python's headers")
def test_compiled_units_learn_what_eager_ones_do(pixart, tmp_path):
    learning = {"iterations": 6, "dtype": "fp32"}
    rules = [{"match": "transformer_blocks.2.*", "keep": True}]  # two of a kind show whether one graph serves both
    _, eager = calibrated(pixart, recipe_of(rules, learning=learning), tmp_path / "eager")
    _, compiled = calibrated(pixart, recipe_of(rules, learning=learning | {"compile": True}), tmp_path / "compiled")
    assert len(compiled.blocks) == 2
    for one, other in zip(eager.blocks, compiled.blocks, strict=True):
        assert other["tasks"][0]["error"] == pytest.approx(one["tasks"][0]["error"], rel=0.02)
