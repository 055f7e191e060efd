"""Whole runs of pipelines that take images: what they leave, that they resume, and that an image redoes its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dmquant.errors import UsageError
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs.settings import Options, resolve, resolve_all
from dmquant.pipelines.runs.tuning import Recovery
from tests.tiny import tiny_sd
from tests.tiny.edits import few_pixels, tiny_qwenimage_edit
from tests.tiny.imaged import controlnet, masks, pictures

pytestmark = pytest.mark.slow
PROMPTS = ["red apple", "blue cat", "a green house"]
FAST = "{name: fast, rounding: {method: adaround}, learning: {iterations: 4, batch_size: 2}, calibration: {prompts: 3}}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, a ControlNet of it, images, masks, prompts and a recipe that learns."""
    root = tmp_path_factory.mktemp("imaged")
    model = tiny_sd(root / "model")
    controlnet(model.unet).save_pretrained(root / "net")
    for name, drawn in (("images", pictures(2, 48)), ("masks", masks(2, 48))):
        (root / name).mkdir()
        for index, image in enumerate(drawn):
            image.save(root / name / f"{index}.png")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "fast.yaml").write_text(FAST)
    return root


@pytest.fixture(scope="module")
def options(root):
    given = {"recipe": str(root / "fast.yaml"), "prompts": str(root / "prompts.txt"), "steps": 4, "dtype": "fp32"}
    given |= {"device": "cpu", "metrics": "psnr", "calibration_prompts": str(root / "prompts.txt")}
    return Options(str(root / "model"), **given)


CASES = {
    "image": {"image": "images", "strength": 0.5},
    "image+mask": {"image": "images", "mask": "masks"},
    "control": {"control": "images", "controlnet": "net"},
}


def typed(root, name):
    return {
        key: value if key == "strength" else (str if key == "controlnet" else lambda path: path)(root / value)
        for key, value in CASES[name].items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_run_shows_what_went_in_and_resumes(root, options, name, tmp_path, capsys):
    settings = resolve(replace(options, **typed(root, name)))
    out = tmp_path / "run"
    stages.run(settings, out, overwrite=False)
    said = capsys.readouterr()
    assert "cut about their centre and resized to 32x32" in said.out + said.err
    report = json.loads((out / "report.json").read_text())
    shown = {"image": "input", "mask": "mask", "control": "control"}
    assert report["inputs"] == {shown[kind]: f"images/{kind}" for kind in name.split("+")}
    assert report["settings"]["pipeline"] == settings.inputs.pipeline
    kind = name.partition("+")[0]
    assert len(list((out / "images" / kind).glob("*.png"))) == len(PROMPTS)
    with Image.open(out / "images" / kind / "00000.png") as image:
        assert image.size == (32, 32)
    page = (out / "report.html").read_text()
    assert page.count('<div class="inputs">') == len(PROMPTS)
    index = json.loads((out / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    made = {path: path.read_bytes() for path in (out / "images").glob("*/*.png")}
    stages.run(resolve(replace(options, **typed(root, name))), out, overwrite=False)
    said = capsys.readouterr()
    assert "model: already there" in said.out + said.err
    assert {path: path.read_bytes() for path in made} == made


def test_each_image_comes_of_its_own_input(root, options, tmp_path):
    one = replace(options, recipe="rtn", prompts=str(root / "prompts.txt"), strength=0.3, image=root / "images")
    stages.generate(resolve(one), tmp_path / "batch", overwrite=False)
    stages.generate(resolve(replace(one, batch_size=1)), tmp_path / "alone", overwrite=False)
    for index in range(len(PROMPTS)):
        together, alone = (
            np.asarray(Image.open(tmp_path / name / f"{index:05d}.png"), dtype=int) for name in ("batch", "alone")
        )
        assert abs(together - alone).max() <= 2
    other = replace(one, image=root / "images" / "1.png")
    stages.generate(resolve(other), tmp_path / "other", overwrite=False)
    same = [
        (tmp_path / "batch" / f"{index:05d}.png").read_bytes() == (tmp_path / "other" / f"{index:05d}.png").read_bytes()
        for index in range(len(PROMPTS))
    ]
    assert same[0] is False


def test_a_model_that_changes_images_runs_with_one_for_each_prompt(root, options, tmp_path):
    tiny_qwenimage_edit(tmp_path / "edit")
    edit = replace(options, model=str(tmp_path / "edit"), recipe="rtn", height=32, width=32, steps=2, num_prompts=2)
    with pytest.raises(UsageError, match="changes images, so it takes an image a prompt"):
        resolve(edit)
    settings = resolve(replace(edit, image=root / "images", batch_size=4))
    assert settings.batch_size == 1
    with few_pixels():
        stages.run(settings, tmp_path / "run", overwrite=False)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["inputs"] == {"input": "images/image"}


def test_recipes_are_compared_on_the_same_inputs(root, options, tmp_path):
    settings = resolve_all(replace(options, recipe=None, image=root / "images", strength=0.5), "rtn,w8a8")
    stages.compare(settings, tmp_path / "compare", overwrite=False)
    assert json.loads((tmp_path / "compare" / "report.json").read_text())["inputs"] == {"input": "images/image"}


def test_a_quantized_model_learns_on_images_too(root, options, tmp_path):
    recovery = Recovery.of("scales", optimizer="adamw", steps=2, batch_size=1, rate=1.0, prompts=3, last=1)
    settings = resolve(replace(options, recipe="rtn", image=root / "images", strength=0.5))
    stages.tune(settings, recovery, tmp_path / "tuned", overwrite=False)
    again = replace(recovery, begin=tmp_path / "tuned")
    stages.tune(settings, again, tmp_path / "again", overwrite=False)
    assert (tmp_path / "again" / "model_index.json").is_file()
