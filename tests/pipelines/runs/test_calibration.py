"""Calibration data belongs to the whole pipeline, its dtype, its prompts and its call; one key says so to all."""

from dataclasses import replace

import pytest
import torch

from dmquant.host.console import Console
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.runs import calibration
from dmquant.pipelines.runs.calibration import calibration_data, data_key, weights_key
from dmquant.pipelines.runs.settings import Options, resolve
from dmquant.pipelines.sweep.trial import with_shared_data
from tests.tiny import tiny_pixart


@pytest.fixture(scope="module")
def settings(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    (folder / "prompts.txt").write_text("red apple\nblue cat\na green house\n")
    (folder / "small.yaml").write_text(
        "name: small\nrounding: adaround\ncalibration: {prompts: 2, steps_per_prompt: 2, held_out: 0.5}\n"
    )
    prompts = str(folder / "prompts.txt")
    options = Options(model=str(original), recipe=str(folder / "small.yaml"), prompts=prompts, dtype="fp32")
    return resolve(replace(options, calibration_prompts=prompts, steps=2, device="cpu"))


def test_the_key_depends_on_all_that_the_data_depends_on_and_on_nothing_else(settings):
    key = data_key(settings, "weights")
    sampling = settings.recipe.calibration.model_copy(update={"seed": 9})
    others = [
        data_key(settings, "other weights"),
        data_key(replace(settings, dtype_name="bf16"), "weights"),
        data_key(replace(settings, steps=3), "weights"),
        data_key(replace(settings, calibration_prompts=("boat", *settings.calibration_prompts[1:])), "weights"),
        data_key(replace(settings, recipe=settings.recipe.model_copy(update={"calibration": sampling})), "weights"),
    ]
    assert len({key, *others}) == 1 + len(others)
    unused = replace(settings, calibration_prompts=(*settings.calibration_prompts[:2], "never read"), seed=5)
    assert data_key(unused, "weights") == key


def test_trials_of_a_sweep_have_data_by_that_key(settings, tmp_path):
    for weights in ("weights", "retrained weights"):
        folder = with_shared_data(settings, tmp_path, weights).calibration_data
        assert folder == tmp_path / "calibration" / data_key(settings, weights)[:8]


def test_data_of_another_text_encoder_is_captured_again(settings, tmp_path):
    pipeline = load_full_precision(settings.model, settings.dtype, settings.device, lambda line: None)
    stores = [calibration_data(pipeline, settings, tmp_path, Console(), key) for key in ("one", "other", "one")]
    assert stores[0].key == stores[2].key != stores[1].key
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_a_pipeline_in_memory_is_known_by_the_weights_and_configurations_of_all_its_parts():
    pipeline = tiny_pixart()
    keys = {weights_key(pipeline)}
    assert keys == {weights_key(tiny_pixart())}
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        with torch.no_grad():
            next(part.parameters()).add_(1)
        keys.add(weights_key(pipeline))
    for part in (pipeline.scheduler, pipeline.transformer):
        part.register_to_config(told="something else")
        keys.add(weights_key(pipeline))
    pipeline.tokenizer.add_tokens(["boat2"])
    keys.add(weights_key(pipeline))
    assert len(keys) == 7


def test_weights_that_were_hashed_in_their_files_are_not_hashed_again(settings, tmp_path, monkeypatch):
    def refuse(pipeline):
        raise AssertionError("the weights were hashed again")

    monkeypatch.setattr(calibration, "weights_key", refuse)
    monkeypatch.setattr(calibration, "calibrate_", lambda *args, made_for, **kwargs: made_for)
    pipeline = load_full_precision(settings.model, settings.dtype, settings.device, lambda line: None)
    made_for = calibration.calibrate(pipeline, settings, tmp_path, Console(), "key of the files")
    assert made_for == {"weights": "key of the files", "dtype": "fp32"}
