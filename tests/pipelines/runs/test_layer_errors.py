"""The errors of a model's layers: measured on the run's own prompts, full precision once for all recipes."""

from dataclasses import replace

import pytest

from dmquant.convert import quantize_
from dmquant.diffusers.quantizer import mark_quantized
from dmquant.diffusers.saving import save_pipeline
from dmquant.host.console import Console
from dmquant.pipelines.models.loading import load_full_precision, load_pipeline
from dmquant.pipelines.runs.probe import FILE, layer_errors, probe_full_precision
from dmquant.pipelines.runs.settings import Options, resolve
from dmquant.recipe import Recipe

PROMPTS = "red apple\nblue cat\na green house\n"


@pytest.fixture(scope="module")
def settings(original, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "three.txt"
    prompts.write_text(PROMPTS)
    return resolve(
        Options(
            model=str(original), prompts=str(prompts), steps=4, height=32, width=32, device="cpu", dtype="fp32", seed=5
        )
    )


class Loading:
    """Loads the full-precision pipeline and counts how often."""

    def __init__(self, settings):
        self.settings, self.times = settings, 0

    def __call__(self):
        self.times += 1
        return load_full_precision(self.settings.model, self.settings.dtype, self.settings.device, lambda line: None)


def probed(settings, folder, requests=None):
    """The probe, and whether it had to be made."""
    load = Loading(settings)
    requests = settings.requests("weights") if requests is None else requests
    return probe_full_precision(load, requests, settings, folder, Console()), load.times == 1


def test_a_probe_is_made_once_and_again_for_what_it_depends_on(settings, tmp_path):
    folder = tmp_path / "probe"
    assert probed(settings, folder)[1]
    assert not probed(settings, folder)[1]
    assert not probed(replace(settings, prompts=(*settings.prompts[:2], "boat")), folder)[1]
    assert probed(settings, folder, settings.requests("other weights"))[1]
    for changed in ({"prompts": ("boat", *settings.prompts[1:])}, {"steps": 3}, {"seed": 6}, {"batch_size": 1}):
        probed(settings, folder)
        assert probed(replace(settings, **changed), folder)[1], changed


def test_a_damaged_probe_is_made_again(settings, tmp_path):
    probe, _ = probed(settings, tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    again, made = probed(settings, tmp_path)
    assert made
    assert all(again.outputs[name].equal(output) for name, output in probe.outputs.items())


def test_no_more_prompts_than_make_a_batch_are_probed(settings, tmp_path):
    for batch_size, rows in ((1, 2), (2, 4), (16, 4)):  # with and without the prompt
        probe, _ = probed(replace(settings, batch_size=batch_size), tmp_path / str(batch_size))
        args, kwargs = probe.calls[0]
        assert len([*args, *kwargs.values()][0]) == rows


def test_every_quantized_layer_is_listed_with_what_it_became(settings, tmp_path):
    probe, _ = probed(settings, tmp_path / "probe")
    pipeline = Loading(settings)()
    recipe = Recipe.model_validate(
        {
            "name": "mixed",
            "keep": "none",
            "weights": "fp4",
            "activations": "none",
            "granularity": "channel",
            "scale": "absmax",
            "store": "fp32",
            "rules": [
                {"match": ["*.attn1.*"], "weights": "int8"},
                {"match": ["proj_out", "adaln_single.*"], "keep": True},
            ],
        }
    )
    reports = quantize_(pipeline.transformer, recipe)
    mark_quantized(pipeline.transformer, recipe)
    save_pipeline(pipeline, tmp_path / "model")
    weight_errors = {report.plan.name: report.error for report in reports}
    loaded = load_pipeline(tmp_path / "model")
    layers = layer_errors(loaded, probe, weight_errors, settings, Console())

    assert {layer.name: layer.weight_error for layer in layers} == weight_errors
    by_name = {layer.name: layer for layer in layers}
    assert by_name["pos_embed.proj"].kind == "Conv2d"
    assert by_name["transformer_blocks.0.ff.net.2"].kind == "Linear"
    assert by_name["transformer_blocks.0.attn1.to_q"].format == "int8"
    assert by_name["transformer_blocks.0.attn2.to_q"].format == "fp4_e2m1"
    width = loaded.transformer.transformer_blocks[0].attn2.to_q.in_features
    assert by_name["transformer_blocks.0.attn2.to_q"].bits == pytest.approx(4 + 32 / width)
    assert all(layer.output_error > 0 for layer in layers)
    order = [layer.name for layer in layers]  # that in which they run
    assert order.index("transformer_blocks.0.attn1.to_q") < order.index("transformer_blocks.0.ff.net.2")
    assert layer_errors(pipeline, probe, weight_errors, settings, Console()) == layers
