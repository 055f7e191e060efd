"""Text encoders and VAEs that a recipe's rules name are quantized with the backbone, saved, loaded and reported."""

import json

import pytest
import torch

import dmquant
from dmquant.convert import component_recipe, quantize_
from dmquant.errors import UsageError, UserError
from dmquant.layers import QUANTIZED
from dmquant.pipelines.commands import stages
from dmquant.pipelines.models.loading import load_pipeline
from dmquant.pipelines.runs.components import with_components
from dmquant.pipelines.runs.settings import Options, resolve, resolve_all
from dmquant.recipe import Recipe
from tests.models.conftest import PROMPTS
from tests.tiny import tiny_pixart
from tests.tiny.parts import t5

CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "use_resolution_binning": False}
PARTS = ("transformer", "text_encoder", "vae")


def pixart(folder=None):
    pipeline = tiny_pixart()
    torch.manual_seed(1)
    pipeline.text_encoder = t5(pipeline.tokenizer, blocks=3).eval()
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    pixart(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = str(folder / "prompts.txt")
    return {"model": str(folder / "tiny"), "prompts": prompts, "steps": 2, "dtype": "fp32", "metrics": "psnr"}


def is_quantized(module):
    return any(isinstance(layer, tuple(QUANTIZED.values())) for layer in module.modules())


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_parts_is_what_quantize_makes_of_each_and_the_report_names_them(options, tmp_path):
    named = Options(**options, recipe="rtn", components=["text_encoder=w8a16", "vae=w8a8"], device="cpu")
    stages.run(resolve(named), tmp_path / "run", False)
    expected, made = pixart(), load_pipeline(tmp_path / "run" / "model")
    quantize_(expected.transformer, "rtn"), quantize_(expected.text_encoder, "w8a16"), quantize_(expected.vae, "w8a8")
    assert all(same(getattr(made, part), getattr(expected, part)) for part in PARTS)
    (recipe,) = json.loads((tmp_path / "run" / "report.json").read_text())["recipes"].values()
    said = recipe["settings"]["text_encoder"]
    assert said.startswith("14 layers in fp8_e4m3, 8.27 bits a quantized weight; ")  # 8.25 but for a last short group
    assert "fp8_e4m3" in recipe["settings"]["vae"]
    assert {rule["component"] for rule in recipe["recipe"]["rules"] if "component" in rule} == {"text_encoder", "vae"}
    config = json.loads((tmp_path / "run" / "model" / "transformer" / "config.json").read_text())
    assert not any("component" in rule for rule in config["quantization_config"]["recipe"]["rules"])


def test_a_comparison_has_each_recipe_with_its_own_parts(options, tmp_path):
    """Models share parts on disk and in memory; the full-precision side never gets a quantized one."""
    other = Recipe.load("rtn").with_settings(name="with-encoder")
    with_components(other, ["text_encoder=w4a16"]).save(tmp_path / "other.yaml")
    resolved = resolve_all(Options(**options, device="cpu"), f"{tmp_path / 'other.yaml'},rtn")
    stages.compare(resolved, tmp_path / "run", False)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    models = [load_pipeline(path) for path in sorted((tmp_path / "run" / "recipes").glob("*/model"))]
    assert sorted(is_quantized(model.text_encoder) for model in models) == [False, True]
    alone = resolve_all(Options(**options, device="cpu"), "rtn")
    stages.compare(alone, tmp_path / "alone", False)
    expected = json.loads((tmp_path / "alone" / "report.json").read_text())["recipes"]["rtn"]["metrics"]["psnr"]
    assert report["recipes"]["rtn"]["metrics"]["psnr"] == expected
    assert report["recipes"]["with-encoder"]["metrics"]["psnr"] != expected


def test_by_python_too(tmp_path):
    pipeline = pixart()
    made = dmquant.quantize_pipeline(pipeline, "rtn", components={"vae": "w8a16"}, out=tmp_path / "model", **CALL)
    assert made.components["vae"]["layers"] == 18
    assert same(load_pipeline(tmp_path / "model").vae, pipeline.vae)
    assert not is_quantized(pipeline.text_encoder)


def test_rules_of_a_part_start_from_nothing_and_later_ones_win():
    rules = [
        {"component": "text_encoder", "match": "*", "weights": "fp8", "granularity": "channel"},
        {"component": "text_encoder", "match": "*.wo", "keep": True},
        {"match": "*", "granularity": "group:32"},
    ]
    recipe = Recipe.from_dict(Recipe.load("gptq").to_dict() | {"rules": rules}, "recipe")
    own, layers = component_recipe(recipe, "text_encoder"), ["a.wi", "a.wo"]
    assert (own.activations, own.rounding.method, own.calibrated) == ("none", "nearest", False)
    found = own.settings_by_layer(layers)
    assert (found["a.wi"].weights, found["a.wi"].granularity, found["a.wo"]) == ("fp8_e4m3", "channel", None)
    assert recipe.settings_by_layer(layers)["a.wo"].granularity == "group:32"
    assert component_recipe(recipe, "vae") is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("text_encodr=w8a16", r"^unknown component 'text_encodr'.*did you mean 'text_encoder'"),
        ("transformer=w8a16", "^component: transformer is the backbone"),
        ("text_encoder", "^--component text_encoder: write NAME=RECIPE"),
        ("text_encoder=default", "^--component text_encoder=default: recipe default takes calibration data"),
        ("text_encoder=w9", "^unknown recipe 'w9'"),
    ],
)
def test_parts_that_make_no_sense_are_refused_before_any_work(options, given, said):
    with pytest.raises(UsageError, match=said):
        resolve(Options(**options, recipe="rtn", components=[given]))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"weights": "fp4", "scale": "hessian"}, "rules of component text_encoder take calibration data"),
        ({"weights": "fp4", "keep": True}, "quantizes none of the layers of T5EncoderModel"),
    ],
)
def test_rules_that_a_part_cannot_have_are_refused_before_the_backbone_changes(rule, said):
    recipe = Recipe.from_dict({"name": "r", "rules": [{"component": "text_encoder", "match": "*", **rule}]}, "recipe")
    pipeline = pixart()
    with pytest.raises(UsageError, match=said):
        dmquant.quantize_pipeline(pipeline, recipe, **CALL)
    assert not is_quantized(pipeline.transformer)


def test_a_part_without_layers_is_refused():
    with pytest.raises(UserError, match=r"^component tokenizer of this pipeline is a .*, which has no layers$"):
        dmquant.quantize_pipeline(pixart(), "rtn", components={"tokenizer": "w8a16"}, **CALL)


def test_an_encoder_of_which_nothing_is_known_is_refused():
    pipeline = pixart()
    pipeline.text_encoder.config.model_type = "strange"
    with pytest.raises(UsageError, match="of a T5EncoderModel it is not known which layers"):
        dmquant.quantize_pipeline(pipeline, "rtn", components={"text_encoder": "w8a16"}, **CALL)
    assert not is_quantized(pipeline.transformer)
