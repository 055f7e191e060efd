import json
import shutil

import pytest
import torch

from dmquant.diffusers.families import families, family_of
from dmquant.errors import UsageError, UserError
from dmquant.pipelines.models.registry import ModelSpec, call_parameters, family_for, registered_models, resolve_model
from dmquant.pipelines.prompts.lists import load_prompts, prompt_sets
from tests.tiny import IMAGE_SIZE, TINY, TOKENS, tiny_flux, tiny_pixart, tiny_sd


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

    family = families()[spec.family]
    assert spec.pipeline in (*family.pipelines, *family.edits)
    assert hasattr(diffusers, spec.pipeline)
    assert {spec.prompts, spec.calibration_prompts} <= prompt_sets().keys()
    assert not set(load_prompts(spec.prompts)) & set(load_prompts(spec.calibration_prompts))
    assert spec.call.keys() <= call_parameters(spec.pipeline).keys()
    assert spec.download_bytes is None or not spec.is_embedded
    assert resolve_model(spec.name) is spec


def test_the_files_and_the_names_in_them_agree():
    assert all(name == spec.name for name, spec in registered_models().items())
    named = {"emoji-pixart", "pixart-sigma", "pixart-alpha", "sd15", "sdxl", "hunyuan", "sd3", "flux-dev", "sana"}
    assert named <= registered_models().keys()


SIZELESS = ("flux", "flux2", "chroma", "hunyuanimage", "qwenimage", "wan")  # families whose backbones are of no size
RECENT = ("flux2-dev", "flux2-klein-base-9b", "chroma", "qwenimage", "cogview4", "auraflow", "wan2.1-1.3b")


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart-sigma", "hunyuan", "sd3", "sana", "dit-256", *RECENT])
def test_published_settings_are_the_defaults_of_the_pipelines_call(name):
    spec = registered_models()[name]
    parameters = call_parameters(spec.pipeline)
    assert spec.steps == parameters["num_inference_steps"].default
    assert spec.guidance == parameters[families()[spec.family].guidance_argument].default


def test_a_spec_refuses_unknown_keys_and_wrong_values():
    good = registered_models()["sd15"].model_dump()
    for change in ({"stepps": 3}, {"steps": 0}, {"dtype": "fp8"}, {"height": "tall"}, {"guidance": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            ModelSpec.model_validate(good | change)


def test_every_pipeline_class_has_a_registered_model_to_take_settings_from():
    known = {name for family in families().values() for name in (*family.pipelines, *family.edits)}
    assert known == {spec.pipeline for spec in registered_models().values()}


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    class Strange(torch.nn.Module):
        pass

    pipeline = tiny_pixart()
    pipeline.transformer = Strange()
    with pytest.raises(UserError, match=r"Strange.*known are .*PixArtTransformer2DModel.*Adding a family"):
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


def test_a_pipeline_of_no_known_family_is_refused_with_what_can_be_done(copy):
    edit(copy / "model_index.json", _class_name="LuminaPipeline")
    with pytest.raises(UserError) as caught:
        resolve_model(str(copy))
    for part in ("LuminaPipeline", "pixart (PixArtSigmaPipeline", "Adding a family", "--family generic --recipe rtn"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_generic_family_takes_any_pipeline_with_its_own_size_and_its_calls_defaults(copy):
    edit(copy / "model_index.json", _class_name="LuminaPipeline")
    spec = resolve_model(str(copy), "generic")
    parameters = call_parameters("LuminaPipeline")
    assert (spec.pipeline, spec.family, spec.height, spec.width) == ("LuminaPipeline", "generic", 32, 32)
    assert (spec.steps, spec.guidance) == tuple(
        parameters[name].default for name in ("num_inference_steps", "guidance_scale")
    )
    family = family_for(spec)
    assert family.component == "transformer"
    assert {"pos_embed.proj", "proj_out"} <= family.keep.keys()  # the first and the last layer, by name


def test_the_generic_family_finds_a_unet_and_its_ends(tmp_path):
    tiny_sd(tmp_path / "sd")
    family = family_for(resolve_model(str(tmp_path / "sd"), "generic"))
    assert family.component == "unet"
    assert {"conv_in", "conv_out"} <= family.keep.keys()


def test_an_embedded_model_can_be_taken_for_generic_too():
    spec = resolve_model("emoji-pixart", "generic")
    own = registered_models()["emoji-pixart"]
    assert (spec.family, spec.component, spec.source, spec.steps) == ("generic", "transformer", own.source, own.steps)
    assert resolve_model("emoji-pixart", "pixart") is own


def test_a_family_that_does_not_exist_or_does_not_fit(pixart_folder):
    with pytest.raises(UsageError, match=r"unknown family 'pixartt': did you mean 'pixart'\?"):
        resolve_model(str(pixart_folder), "pixartt")
    with pytest.raises(UsageError, match=r"--family flux knows FluxTransformer2DModel.*PixArtTransformer2DModel"):
        resolve_model(str(pixart_folder), "flux")
    with pytest.raises(UsageError, match=r"--family unet knows UNet2DConditionModel.*has no unet"):
        resolve_model(str(pixart_folder), "unet")


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionControlNetPipeline",
        "FluxImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "FluxControlPipeline",
    ],
)
@pytest.mark.parametrize("family", [None, "generic"])
def test_a_pipeline_that_takes_more_than_a_prompt_is_refused_with_what_to_do(copy, name, family):
    edit(copy / "model_index.json", _class_name=name)
    with pytest.raises(UserError, match=rf"{name}\.from_pretrained\(\.\.\., transformer=quantized\.transformer\)"):
        resolve_model(str(copy), family)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CogVideoXPipeline", "CogVideoXPipeline, which makes videos"),
        ("NoSuchPipeline", "diffusers .* no NoSuchPipeline"),
    ],
)
def test_a_pipeline_that_makes_videos_or_does_not_exist_is_refused(copy, name, says):
    edit(copy / "model_index.json", _class_name=name)
    with pytest.raises(UserError, match=says):
        resolve_model(str(copy), "generic")


def test_a_pipeline_without_any_backbone_is_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["denoiser"] = index.pop("transformer")
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"no transformer or unet, but .*denoiser"):
        resolve_model(str(copy))


def test_a_folder_called_like_a_repository_takes_its_settings(tmp_path):
    for name, expected in (("FLUX.1-schnell", "flux-schnell"), ("FLUX.1-dev", "flux-dev")):
        tiny_flux(tmp_path / name)
        spec, relative = resolve_model(str(tmp_path / name)), registered_models()[expected]
        assert (spec.steps, spec.guidance) == (relative.steps, relative.guidance)
        assert (spec.height, spec.width) == (1024, 1024)  # its configuration tells no size


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].family not in SIZELESS])
def test_a_local_folder_of_every_family_has_its_own_size(name, tmp_path):
    pipeline = TINY[name].build(tmp_path / "model")
    spec = resolve_model(str(tmp_path / "model"))
    assert spec.family == TINY[name].family
    pixels = getattr(pipeline, family_for(spec).component).config.sample_size * getattr(pipeline, "vae_scale_factor", 2)
    assert (spec.height, spec.width) == (pixels, pixels)


def test_a_pipeline_with_its_own_code_is_refused(copy):
    edit(copy / "model_index.json", _class_name=["my_pipeline", "MyPipeline"])
    with pytest.raises(UserError, match="own code"):
        resolve_model(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_index_is_named(copy, content):
    (copy / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model_index\.json"):
        resolve_model(str(copy))
