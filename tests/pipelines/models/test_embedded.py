import pytest
import torch

from dmquant.diffusers.families import family_of
from dmquant.pipelines.models.loading import embedded_folder, load_full_precision, resolve_dtype
from dmquant.pipelines.models.registry import EMBEDDED, registered_models, resolve_model
from dmquant.pipelines.prompts.lists import load_prompts

EMBEDDED_MODELS = [spec for spec in registered_models().values() if spec.source.startswith(EMBEDDED)]


@pytest.mark.parametrize("spec", EMBEDDED_MODELS, ids=lambda spec: spec.name)
def test_an_embedded_model_loads_and_draws_with_its_own_settings(spec):
    pipeline = load_full_precision(spec, resolve_dtype(spec.dtype, "cpu"), "cpu")
    assert type(pipeline).__name__ == spec.pipeline
    assert family_of(pipeline).name == spec.family
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        load_prompts(spec.prompts, 2),
        height=spec.height,
        width=spec.width,
        num_inference_steps=4,
        guidance_scale=spec.guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **spec.call,
    ).images
    assert images.shape == (2, 3, spec.height, spec.width)
    assert images.isfinite().all()
    assert images.std() > 0.05


@pytest.mark.parametrize("spec", EMBEDDED_MODELS, ids=lambda spec: spec.name)
def test_a_copy_of_an_embedded_model_given_as_a_folder_gets_the_same_settings(spec):
    local = resolve_model(str(embedded_folder(spec.source)))
    same = {"family", "pipeline", "height", "width", "steps", "guidance", "dtype", "prompts", "call"}
    assert local.model_dump(include=same) == spec.model_dump(include=same)


@pytest.mark.parametrize("spec", EMBEDDED_MODELS, ids=lambda spec: spec.name)
def test_embedded_files_fit_in_16_megabytes(spec):
    size = sum(path.stat().st_size for path in embedded_folder(spec.source).rglob("*") if path.is_file())
    assert 0 < size <= 16_000_000
