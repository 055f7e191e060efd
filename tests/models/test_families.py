"""A whole run on a tiny pipeline of every class, and what any diffusers app makes of its result."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dmquant.convert import plan
from dmquant.diffusers.calling import call_pipeline
from dmquant.evaluation.images import load_frames
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.pipelines.commands import listing, stages
from dmquant.pipelines.models import folders
from dmquant.pipelines.runs.settings import Options, Settings, resolve
from dmquant.recipe import Recipe
from tests.tiny import TINY, marked

COUNT = 2
LEARNED = """
name: learned
weights: fp4
activations: fp8
granularity: group:16
rounding: adaround
calibration: {prompts: 4, steps_per_prompt: 2, held_out: 0.25}
learning: {iterations: 5, batch_size: 2, checks: 1}
"""
RUNS = {name: (name, "rtn") for name in TINY}
RUNS |= {f"{name}, learned": (name, "learned") for name in ("sd15", "hunyuan-1.2", "flux")}
RUNS["wan-22, learned"] = ("wan-22", "learned")


class Run(NamedTuple):
    """A finished run: its folder, and what it was told."""

    folder: Path
    settings: Settings


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", params=marked(RUNS))
def run(request, home):
    name, recipe = RUNS[request.param]
    tiny, model = TINY[name], home / name
    if not model.exists():
        tiny.build(model)
    learned, prompts, calibration = home / "learned.yaml", home / f"{name}.txt", home / f"{name}-calibration.txt"
    learned.write_text(LEARNED)
    prompts.write_text("\n".join(tiny.prompts[:COUNT]))
    calibration.write_text("\n".join(tiny.prompts[:4]))
    settings = resolve(
        Options(
            model=str(model),
            recipe="rtn" if recipe == "rtn" else str(learned),
            prompts=str(prompts),
            calibration_prompts=str(calibration),
            steps=2,
            guidance=3.0 if tiny.takes_guidance else None,
            height=tiny.size,
            width=tiny.size,
            frames=tiny.call.get("num_frames"),
            dtype="fp32",
            metrics="psnr,ssim,latent_mse",
        )
    )
    out = home / f"{name}-{recipe}"
    stages.run(settings, out, False)
    return Run(out, settings)


@pytest.fixture(scope="module")
def loaded(run):
    """The pipeline that the run leaves, as diffusers loads it."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(run.folder / "model")


def pixels(path):
    """Those of an image, or of all frames of a video."""
    return load_frames(path).movedim(-3, -1).numpy().astype(np.int64)


def test_there_are_images_of_both_sides_and_they_differ(run):
    for index in range(COUNT):
        exact, quantized = (pixels(run.folder / "images" / side / f"{index:05d}.png") for side in ("fp", "quantized"))
        assert exact.shape == quantized.shape
        frames = (run.settings.model.frames,) if run.settings.model.frames > 1 else ()
        assert exact.shape == (*frames, run.settings.height, run.settings.width, 3)
        assert 0 < np.abs(exact - quantized).mean() < 64


def test_the_report_scores_them(run):
    content = json.loads((run.folder / "report.json").read_text())
    [result] = content["recipes"].values()
    assert content["prompts"] == list(run.settings.prompts)
    if (argument := run.settings.family.guidance_argument) in run.settings.call:
        assert content["settings"]["guidance"] == run.settings.call[argument] == 3.0
    assert (argument in run.settings.call) == TINY[run.settings.model.name].takes_guidance
    assert {name: metric["images"] for name, metric in result["metrics"].items()} == dict.fromkeys(
        ("psnr", "ssim", "latent_mse"), COUNT
    )
    assert 10 < result["metrics"]["psnr"]["value"] < 80
    assert result["metrics"]["latent_mse"]["value"] > 0
    task = "text-to-video" if run.settings.model.frames > 1 else "text-to-image"
    assert f"pipeline_tag: {task}\n" in (run.folder / "model" / "README.md").read_text()
    assert 0 < result["size_bytes"] < sum(path.stat().st_size for path in _weights(run.settings))


def _weights(settings):
    """Files of the backbones in full precision."""
    return [path for name in settings.family.names for path in Path(settings.model.source, name).glob("*.safetensors")]


def test_the_model_folder_gives_the_same_images_to_any_diffusers_app(run, loaded):
    settings = run.settings
    seeds = [settings.seed + index for index in range(COUNT)]
    pipeline = settings.family.prompted(loaded)
    images = call_pipeline(pipeline, settings.prompts, seeds, "np", settings.call)
    for index, image in enumerate(images):
        assert np.array_equal(np.rint(image * 255), pixels(run.folder / "images" / "quantized" / f"{index:05d}.png"))


def test_every_layer_that_the_family_does_not_keep_is_quantized(run, loaded):
    family = run.settings.family
    exact = family.backbones_of(TINY[run.settings.model.name].build())
    backbones = family.backbones_of(loaded)
    assert backbones.keys() == exact.keys()
    for backbone, of_exact in zip(backbones.values(), exact.values(), strict=True):
        wanted = {step.name for step in plan(of_exact, Recipe.load("rtn").keeping(family.keep))}
        found = {name for name, layer in backbone.named_modules() if isinstance(layer, QuantLinear | QuantConv2d)}
        assert found == wanted


def test_inspect_describes_every_backbone(run, capsys):
    listing.inspect(run.folder, False)
    text = " ".join(capsys.readouterr().out.split())
    for name in run.settings.family.backbones_among(folders.components(run.folder / "model")):
        assert f"{name}: {run.settings.family.backbones[0]}, family {run.settings.family.name}, guidance " in text
        assert f"{name}: recipe {run.settings.recipe.name}, weights " in text
