"""Parts that are in memory serve the next model in their place: it computes what it does when all of it is loaded."""

import pytest
import torch

from dmquant.diffusers.families import families
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import resolve_model
from dmquant.pipelines.runs.loaded_parts import LoadedParts
from tests.calib.runs import call_of
from tests.tiny import TINY

MODELS = ("sdxl", "sd3", "dit", "hunyuan-1.2")


@pytest.mark.parametrize("model", MODELS)
def test_a_pipeline_with_parts_of_another_is_the_same_and_loads_its_own_backbone(model, tmp_path):
    TINY[model].build(tmp_path)
    family = families()[TINY[model].family]
    spec, parts = resolve_model(str(tmp_path), None), LoadedParts()
    whole = load_full_precision(spec, torch.float32, "cpu")
    assert parts.of([family.component], {"vae/config.json": "digest"}) == {}
    parts.keep(whole)
    again = load_full_precision(spec, torch.float32, "cpu", parts=parts.kept)
    assert again.components.keys() == whole.components.keys()
    for name, part in whole.components.items():
        is_own = name in (family.component, "scheduler")
        assert part is None or (again.components[name] is part) != is_own, name
    prompts, call = list(TINY[model].prompts[:1]), call_of(model, 1) | {"output_type": "np"}
    images = [
        family.prompted(pipeline)(prompts, generator=torch.Generator().manual_seed(0), **call).images
        for pipeline in (whole, again)
    ]
    assert (images[0] == images[1]).all()


def test_parts_of_other_files_are_dropped():
    parts = LoadedParts()
    parts.of(["transformer"], {"vae/model.safetensors": "a", "transformer/model.safetensors": "x"})
    parts.kept = {"vae": object()}
    assert parts.of(["transformer"], {"vae/model.safetensors": "a", "transformer/model.safetensors": "y"})
    assert not parts.of(["transformer"], {"vae/model.safetensors": "b", "transformer/model.safetensors": "y"})
    assert not parts.kept


def test_a_run_alone_keeps_none_for_its_memory():
    parts = LoadedParts(keeps=False)
    parts.keep(object())
    assert parts.kept == {}
