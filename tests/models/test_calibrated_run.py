"""A calibrated run: damage to what calibration left, and another wording of the recipe, change no bit."""

import json
import re
import shutil

import pytest

from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs.settings import Options, resolve
from tests.tiny import tiny_pixart

RECIPE = """name: {name}
description: {description}
weights: {weights}
granularity: group:16
rounding: gptq
calibration: {{prompts: 3, steps_per_prompt: 1, held_out: 0.34, sampler: uniform}}
learning: {{batch_size: 2}}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs the model in a folder by the recipe, in other words if asked; returns the lines that it logged."""
    given = tmp_path_factory.mktemp("given")
    tiny_pixart(given / "tiny", blocks=1)
    (given / "prompts.txt").write_text("red apple\nblue cat\na green house\n")

    def run(out, name="small", description="one", weights="fp4"):
        (given / "recipe.yaml").write_text(RECIPE.format(name=name, description=description, weights=weights))
        given_prompts = str(given / "prompts.txt")
        options = Options(
            model=str(given / "tiny"),
            recipe=str(given / "recipe.yaml"),
            prompts=given_prompts,
            calibration_prompts=given_prompts,
            steps=2,
            dtype="fp32",
            metrics="psnr",
        )
        before = len((out / "log.txt").read_text()) if out.exists() else 0
        stages.run(resolve(options), out, False)
        return (out / "log.txt").read_text()[before:]

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    command(out)
    return out


@pytest.fixture
def again(finished, tmp_path):
    """A finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def model_of(out):
    return {path.name: path.read_bytes() for path in (out / "model" / "transformer").iterdir()}


def images_of(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted((out / "images").rglob("*.png"))}


def index_of(out):
    [path] = out.glob("calibration/data/*/index.json")
    return path


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip_facts(out):
    for path in out.glob("calibration/codes-*/blocks/*.json"):
        replace_in(path, "fp4_e2m1", "fp4_e1m2")


DAMAGES = {
    "index cut": lambda out: index_of(out).write_bytes(index_of(out).read_bytes()[:300]),
    "index removed": lambda out: index_of(out).unlink(),
    "held out inverted": lambda out: replace_in(index_of(out), '"held_out": false', '"held_out": true'),
    "facts flipped": flip_facts,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_what_calibration_left_changes_no_bit_of_the_model(damage, finished, again, command):
    DAMAGES[damage](again)
    shutil.rmtree(again / "model")
    if damage != "facts flipped":  # so that the data is needed
        shutil.rmtree(next(again.glob("calibration/codes-*")))
    command(again)
    assert model_of(again) == model_of(finished)
    assert images_of(again) == images_of(finished)
    assert index_of(again).read_bytes() == index_of(finished).read_bytes()


def test_a_recipe_in_other_words_finds_its_codes_and_images_again(finished, again, command):
    made = {path: (again / path).stat().st_mtime_ns for path in images_of(again)}
    lines = command(again, name="renamed", description="two")
    assert len(re.findall("block .*: already there", lines)) == len(re.findall("block .*: ", lines)) > 0
    assert {path: (again / path).stat().st_mtime_ns for path in images_of(again)} == made
    [one, other] = [
        json.loads(model_of(out)["config.json"])["quantization_config"]["recipe"] for out in (finished, again)
    ]
    assert (other.pop("name"), other.pop("description")) == ("renamed", "two")
    assert (one.pop("name"), one.pop("description")) == ("small", "one")
    assert one == other
    assert len(list(again.glob("calibration/*"))) == 2


def test_another_recipe_of_the_same_name_shares_the_data_and_no_codes(finished, again, command):
    lines = command(again, weights="fp6")
    assert "block" in lines
    assert "block 1 of" not in "".join(line for line in lines.splitlines() if "already there" in line)
    assert model_of(again) != model_of(finished)
    assert len(list(again.glob("calibration/data/*"))) == 1
    assert len(list(again.glob("calibration/codes-*"))) == 2
