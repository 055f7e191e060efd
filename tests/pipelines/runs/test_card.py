"""The model card of a scored model: what a hub reads of it, and what a person does."""

import dataclasses

import pytest
import yaml
from markdown_it import MarkdownIt

from dmquant.evaluation.result import Backbone, Metric, RecipeResult, Reference, Report
from dmquant.pipelines.runs.card import scored_card


@pytest.fixture
def report():
    metrics = {
        "psnr": Metric(27.5, 26.9, 28.1, images=64, median=27.8, worst=21.25),
        "clip_score": Metric(31.25, images=64, backbone=Backbone("emoji-clip", "ab" * 32)),
        "hpsv2": Metric.not_computed("no weights"),
    }
    recipe = RecipeResult(
        weights="fp4_e2m1",
        activations="fp6_e2m3",
        bits_per_weight=4.31,
        size_bytes=4_000_000,
        metrics=metrics,
        recipe={"name": "w4a6", "weights": "fp4_e2m1"},
    )
    reference = {"clip_score": Metric(32.5, images=64, backbone=Backbone("emoji-clip", "ab" * 32))}
    return Report(
        model="PixArt-Sigma",
        reference=Reference(dtype="bf16", size_bytes=16_000_000, metrics=reference),
        recipes={"w4a6": recipe, "other": dataclasses.replace(recipe, weights="int8")},
        prompts=["a"] * 64,
        settings={"source": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "steps": 20, "real images": "/home/me/photos"},
        versions={"torch": "2.13.0"},
        command="dmquant run pixart-sigma --w fp4 --a fp6",
    )


def card(report):
    return scored_card(report, "w4a6", "PixArtSigmaPipeline", "torch.bfloat16")


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_front_matter_says_what_a_hub_lists_the_model_by(report):
    front = front_matter(card(report))
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert front["base_model"] == "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    assert {"dmquant", "fp4_e2m1"} <= set(front["tags"])


def test_scores_stand_with_interval_spread_network_and_full_precision(report):
    lines = card(report).splitlines()
    assert "| PSNR ↑ | 27.50 dB | 26.90 to 28.10 | median 27.80, worst 5 % 21.25 |  | 64 |  |  |" in lines
    (clip,) = (line for line in lines if line.startswith("| CLIP score"))
    assert "CLIP score (emoji-clip)" in clip
    assert {"31.25", "32.50"} <= {part.strip() for part in clip.split("|")}


def test_the_recipe_in_the_card_is_the_recipe(report):
    text = card(report).split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(text) == report.recipes["w4a6"].recipe
    assert "int8" not in card(report)


def test_a_recipe_cannot_end_its_block(report):
    recipe = dataclasses.replace(report.recipes["w4a6"], recipe={"description": "a\n\n```\n\n![x](https://evil)"})
    text = card(dataclasses.replace(report, recipes={"w4a6": recipe}))
    (block,) = (token for token in MarkdownIt().parse(text) if token.info == "yaml")
    assert yaml.safe_load(block.content) == recipe.recipe


def test_the_lines_that_load_it_are_python(report):
    compile(card(report).split("```python\n")[1].split("```")[0], "card", "exec")


def test_no_path_of_the_machine_that_made_it_is_in_the_card(report):
    assert "dmquant run pixart-sigma" in card(report)
    settings = {**report.settings, "source": "/home/me/pipeline"}
    command = "dmquant compare some/pipeline --out=/home/me/out --recipes rtn,/home/me/mine.yaml '/home/me/a b'"
    local = dataclasses.replace(report, settings=settings, command=command)
    assert "/home/me" not in card(report) + card(local)
    assert "dmquant compare pipeline --out=out --recipes rtn,mine.yaml 'a b'" in card(local)
    hub = dataclasses.replace(report, command="dmquant run PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    assert "dmquant run PixArt-alpha/PixArt-Sigma-XL-2-1024-MS" in card(hub)
    assert "base_model" not in front_matter(card(local))
