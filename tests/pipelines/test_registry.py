import fnmatch
import json
import shutil

import pytest
import torch

from dmquant.errors import UsageError, UserError
from dmquant.pipelines.families import families, family_of
from dmquant.pipelines.prompts import prompt_sets
from dmquant.pipelines.registry import EMBEDDED, ModelSpec, registered_models, resolve_model
from tests.tiny import IMAGE_SIZE, TOKENS, tiny_pixart, tiny_sd, tiny_sdxl

BUILDERS = {"pixart": [tiny_pixart], "unet": [tiny_sd, tiny_sdxl]}


@pytest.fixture(scope="module")
def pixart_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "my-pixart"
    tiny_pixart(folder)
    return folder


@pytest.fixture
def copy(pixart_folder, tmp_path):
    return shutil.copytree(pixart_folder, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("spec", registered_models().values(), ids=lambda spec: spec.name)
def test_every_registered_model_names_a_family_a_pipeline_class_and_a_prompt_set_that_exist(spec):
    import diffusers

    assert spec.pipeline in families()[spec.family].pipelines
    assert hasattr(diffusers, spec.pipeline)
    assert spec.prompts in prompt_sets()
    assert (spec.download_bytes is None) == spec.source.startswith(EMBEDDED)
    assert resolve_model(spec.name) is spec


def test_the_files_and_the_names_in_them_agree():
    assert all(name == spec.name for name, spec in registered_models().items())
    assert {"emoji-pixart", "pixart-sigma", "pixart-alpha", "sd15", "sdxl"} <= registered_models().keys()


def test_a_spec_refuses_unknown_keys_and_wrong_values():
    good = registered_models()["sd15"].model_dump()
    for change in ({"stepps": 3}, {"steps": 0}, {"dtype": "fp8"}, {"height": "tall"}, {"guidance": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            ModelSpec.model_validate(good | change)


def test_every_pipeline_class_has_a_registered_model_to_take_settings_from():
    known = {name for family in families().values() for name in family.pipelines}
    assert known == {spec.pipeline for spec in registered_models().values()}


@pytest.mark.parametrize("name", families())
def test_keep_and_blocks_of_a_family_name_layers_that_its_models_have(name):
    family = families()[name]
    pipelines = [build() for build in BUILDERS[name]]
    layers = set()
    for pipeline in pipelines:
        assert family_of(pipeline) is family
        assert type(pipeline).__name__ in family.pipelines
        backbone = getattr(pipeline, family.component)
        layers |= {n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        for path in family.blocks:
            assert any(True for _ in backbone.get_submodule(path).parameters())
    for pattern in family.keep:
        assert fnmatch.filter(layers, pattern), pattern
    kept = {layer for pattern in family.keep for layer in fnmatch.filter(layers, pattern)}
    in_blocks = {layer for layer in layers if layer.partition(".")[0] in family.blocks}
    assert kept | in_blocks == layers
    assert not kept & in_blocks


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    class Strange(torch.nn.Module):
        pass

    pipeline = tiny_pixart()
    pipeline.transformer = Strange()
    with pytest.raises(UserError, match=r"Strange.*PixArtTransformer2DModel, UNet2DConditionModel"):
        family_of(pipeline)


def test_a_local_folder_takes_its_own_size_and_token_limit_and_a_relatives_settings(pixart_folder):
    spec = resolve_model(str(pixart_folder))
    relative = registered_models()["emoji-pixart"]
    assert (spec.name, spec.source) == ("my-pixart", str(pixart_folder))
    assert (spec.height, spec.width) == (IMAGE_SIZE, IMAGE_SIZE)
    assert spec.call["max_sequence_length"] == TOKENS < relative.call["max_sequence_length"]
    assert (spec.guidance, spec.prompts, spec.family) == (relative.guidance, relative.prompts, "pixart")


def test_a_folder_the_size_of_a_big_model_takes_that_models_settings(copy):
    edit(copy / "transformer/config.json", sample_size=[512, 480])
    spec = resolve_model(str(copy))
    assert (spec.height, spec.width) == (1024, 960)
    assert (spec.guidance, spec.prompts) == (4.5, "default")


def test_a_hub_id_that_is_registered_is_the_registered_model():
    sdxl = registered_models()["sdxl"]
    assert resolve_model(sdxl.source) is sdxl


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown model 'pixart-simga'.*did you mean 'pixart-sigma'"):
        resolve_model("pixart-simga")


@pytest.mark.parametrize("text", ["/no/such/folder", "./sdxl", "a/b/c"])
def test_a_path_that_does_not_exist_is_called_that(text):
    with pytest.raises(UserError, match=f"there is no folder {text}"):
        resolve_model(text)


def test_a_folder_that_is_no_pipeline(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no diffusers pipeline: it has no model_index\.json"):
        resolve_model(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="single component"):
        resolve_model(str(copy / "transformer"))
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(copy / "model_index.json"))


def test_a_pipeline_of_no_known_family(copy):
    edit(copy / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(UserError, match=r"FluxPipeline.*known are PixArtSigmaPipeline"):
        resolve_model(str(copy))


def test_a_pipeline_with_its_own_code_is_refused(copy):
    edit(copy / "model_index.json", _class_name=["my_pipeline", "MyPipeline"])
    with pytest.raises(UserError, match="own code"):
        resolve_model(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_index_is_named(copy, content):
    (copy / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model_index\.json"):
        resolve_model(str(copy))
