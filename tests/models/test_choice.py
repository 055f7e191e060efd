"""A sensitivity study and choices by it on a small pipeline: what they leave, that they resume, and bad input."""

import csv
import json

import pytest
import yaml

from dmquant.errors import UsageError, UserError
from dmquant.pipelines.choice import measurements, study
from dmquant.pipelines.choice.measuring import Bench
from dmquant.pipelines.choice.record import Study
from dmquant.pipelines.choice.targets import Target
from dmquant.pipelines.commands import choice_stages
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import resolve
from dmquant.recipe import Recipe

RECIPE = {
    "name": "small",
    "weights": "fp4",
    "activations": "fp6",
    "granularity": "group:16",
    "store": "e4m3",
    "rounding": "gptq",
    "calibration": {"prompts": 2, "steps_per_prompt": 2},
    "learning": {"batch_size": 1},
}


@pytest.fixture(scope="module")
def settings(quick, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    options = quick(recipe=str(file), steps=2, metrics="psnr,latent_mse")
    return resolve(options)


@pytest.fixture(scope="module")
def costs(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "costs"
    choice_stages.sensitivity(settings, folder, False, None, 2)
    return folder


def target(**given):
    return Target.of(**(dict.fromkeys(("bits", "size", "psnr", "lpips")) | given))


def test_a_study_leaves_costs_that_add_up_a_page_a_table_and_a_recipe(costs):
    found = Study.load(costs / runfolder.COSTS)
    assert len(found.quantized) < len(found.layers)
    assert all(
        layer.measured > 0 and layer.estimated > 0 and len(layer.by_step) == 2 for layer in found.layers.values()
    )
    for option in ("fp4_e2m1 group:16", "fp6_e2m3 group:32"):
        assert found.formats[option] == pytest.approx(found.predicted(option), rel=1.0)
    assert found.formats["fp8_e4m3 group:64"] < found.formats["fp4_e2m1 group:16"] < found.formats["nl3 group:32"]
    assert found.inputs["fp8"] < found.inputs["fp4"]
    assert [(one.first, one.last) for one in found.ranges] == [(0, 0), (1, 1)]
    assert found.correlation > 0.5
    rows = list(csv.DictReader((costs / runfolder.COSTS_TABLE).open()))
    assert {row["layer"] for row in rows} == set(found.layers)
    assert (costs / runfolder.COSTS_PLOT).read_bytes().startswith(b"\x89PNG")
    assert "Layers to leave alone" in (costs / runfolder.COSTS_PAGE).read_text()
    Recipe.from_dict({"name": "kept"} | yaml.safe_load((costs / runfolder.KEEP).read_text()), "keep.yaml")


def test_a_study_that_was_stopped_goes_on_where_it_was(settings, costs, tmp_path, monkeypatch):
    whole, count = Study.load(costs / runfolder.COSTS), {"left": 5}
    cost = Bench.cost

    def stopping(bench):
        if not count["left"]:
            raise KeyboardInterrupt
        count["left"] -= 1
        return cost(bench)

    monkeypatch.setattr(Bench, "cost", stopping)
    with pytest.raises(KeyboardInterrupt):
        choice_stages.sensitivity(settings, tmp_path / "study", False, None, 2)
    [measured] = (tmp_path / "study").glob(f"{runfolder.OPTIONS}/*/{measurements.FILE}")
    assert len(json.loads(measured.read_text())["costs"]) == 5
    count["left"] = 10_000
    monkeypatch.setattr(study, "solve", None)  # all layers are solved
    choice_stages.sensitivity(settings, tmp_path / "study", False, None, 2)
    again = Study.load(tmp_path / "study" / runfolder.COSTS)
    assert 10_000 - count["left"] == len(whole.layers) + len(whole.formats) + len(whole.inputs) + 4 - 5
    assert again.layers == whole.layers
    assert again.formats == whole.formats


@pytest.mark.slow
def test_a_choice_is_made_by_a_study_and_proved_beside_one_format_for_all(settings, costs, tmp_path):
    choice_stages.choose(settings, target(bits=4.5), costs, tmp_path / "run", False)
    chosen = Recipe.load(str(tmp_path / "run" / runfolder.CHOSEN))
    assert chosen.name == "small-4.5bits"
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert set(report["recipes"]) == {"small-4.5bits", "uniform-fp4_e2m1-group16"}
    run = RunFolder(tmp_path / "run")
    made = {name: RunFolder(run.recipe(name)).record("model") for name in report["recipes"]}
    assert made["small-4.5bits"]["bits_per_quantized_weight"] <= 4.5
    assert len(made["small-4.5bits"]["formats"]) > 1
    study_of = Study.load(costs / runfolder.COSTS)
    options = {name: rule.weights for rule in chosen.rules for name in rule.match}
    assert set(options) == set(study_of.quantized)
    log = (tmp_path / "run/log.txt").read_text()
    assert "chosen against one format for all: 4." in log


@pytest.mark.slow
def test_a_quality_is_reached_on_the_prompts_it_was_measured_on(settings, costs, tmp_path):
    choice_stages.choose(settings, target(psnr=25.0), costs, tmp_path / "run", False)
    log = (tmp_path / "run/log.txt").read_text()
    assert "--min-psnr 25: " in log
    with pytest.raises(UserError, match=r"--min-psnr 99 cannot be reached: the largest choice .* ask for less"):
        choice_stages.choose(settings, target(psnr=99.0), costs, tmp_path / "other", False)


def test_one_prompt_is_too_few(quick, tmp_path):
    prompts = tmp_path / "one.txt"
    prompts.write_text("a red apple\n")
    alone = resolve(quick(calibration_prompts=str(prompts)))
    with pytest.raises(UserError, match="costs take two prompts at least"):
        choice_stages.sensitivity(alone, tmp_path / "study", False, None, 2)


@pytest.mark.slow
def test_costs_of_another_model_are_not_taken(settings, costs, quick, tmp_path):
    other = resolve(quick(recipe="rtn", steps=1))
    choice_stages.choose(other, target(bits=5.0), tmp_path / "costs", tmp_path / "run", False)
    assert Study.load(tmp_path / "costs" / runfolder.COSTS).key != Study.load(costs / runfolder.COSTS).key


def test_a_file_of_others_leaves_nothing_to_choose(quick, tmp_path, monkeypatch):
    given = resolve(quick())
    monkeypatch.setattr(choice_stages, "FileRecipe", type(given.recipe))
    with pytest.raises(UsageError, match="leaves nothing to choose"):
        choice_stages.sensitivity(given, tmp_path / "study", False, None, 2)
