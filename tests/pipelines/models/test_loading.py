import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmquant.diffusers.families import families
from dmquant.errors import UsageError, UserError
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.loading import load_full_precision, resolve_device, resolve_dtype
from dmquant.pipelines.models.registry import registered_models, resolve_model
from tests.tiny import IMAGE_SIZE, tiny_dit, tiny_pixart, tiny_sd, tiny_sdxl

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pixart")


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_full_precision(resolve_model(str(folder)), dtype, "cpu")


def generate(pipeline, call):
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        "a red cat",
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=2,
        generator=generator,
        output_type="pt",
        **call,
    ).images


@pytest.mark.parametrize("build", [tiny_pixart, tiny_sd, tiny_sdxl])
def test_a_local_folder_loads_and_makes_the_same_image_with_its_resolved_settings(build, tmp_path):
    built = build(tmp_path / "model")
    spec = resolve_model(str(tmp_path / "model"))
    loaded = load_full_precision(spec, torch.float32, "cpu")
    assert type(loaded).__name__ == spec.pipeline
    assert torch.equal(generate(loaded, spec.call), generate(built, spec.call))


def test_weights_are_in_the_dtype_asked_for(original):
    pipeline = load(original, torch.bfloat16)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.bfloat16}
    assert not pipeline.transformer.training


def test_a_safety_checker_is_neither_needed_nor_loaded(tmp_path):
    folder = tmp_path / "sd"
    tiny_sd(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder).safety_checker is None


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_in_any_component_is_named(folder, component, keep):
    path = folder / WEIGHTS[component]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{WEIGHTS[component]} is truncated or damaged") as caught:
        load(folder)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_file_with_bytes_added_or_its_header_changed_is_named(folder):
    path = folder / WEIGHTS["transformer"]
    whole = path.read_bytes()
    for damaged in (whole + b"x", whole.replace(b'"F32"', b'"F16"', 1), whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{WEIGHTS['transformer']} is truncated or damaged"):
            load(folder)


def test_a_git_lfs_pointer_is_recognised(folder):
    (folder / WEIGHTS["vae"]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load(folder)


def test_a_backbone_with_a_tensor_missing_is_not_filled_with_random_values(folder):
    path = folder / WEIGHTS["transformer"]
    tensors = load_file(path)
    del tensors["transformer_blocks.0.attn1.to_q.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensor.*transformer_blocks\.0\.attn1\.to_q\.weight"):
        load(folder)


def test_a_backbone_of_another_shape_is_one_line(folder):
    path = folder / WEIGHTS["transformer"]
    tensors = load_file(path)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'proj_out.weight' in shape \[31, 32\], which its config.json says"):
        load(folder)


def test_weights_that_are_not_finite_are_refused(folder):
    path = folder / WEIGHTS["transformer"]
    tensors = load_file(path)
    tensors["proj_out.weight"][0, 0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"proj_out\.weight.*NaN or infinity"):
        load(folder)


def test_weights_that_are_missing_or_only_pickled(folder):
    path = folder / WEIGHTS["transformer"]
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"transformer/\*\.safetensors \(pickled"):
        load(folder)
    path.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"lacks transformer/\*\.safetensors$"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    pipeline = load(folder)
    (folder / WEIGHTS["transformer"]).unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    other = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model.fp16-00001-of-00009.safetensors"}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(other))
    load(folder)
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks transformer/{shards[1].name}"):
        load(folder)
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"lacks transformer/\*\.safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("suffix", ["fp16", "bf16"])
def test_any_variant_that_stands_alone_is_found_and_none_beside_the_plain_files(folder, suffix):
    path = folder / WEIGHTS["transformer"]
    shutil.copy(path, path.with_suffix(f".{suffix}.safetensors"))
    assert folders.variant(folder, "transformer") is None
    path.unlink()
    assert folders.variant(folder, "transformer") == suffix
    path.with_suffix(f".{suffix}.safetensors").rename(path.with_suffix(f".{suffix}-00001-of-00001.safetensors"))
    assert folders.variant(folder, "transformer") == suffix


def test_a_missing_component_is_named(folder):
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UserError, match="lacks scheduler/"):
        load(folder)


def test_weights_that_exist_only_as_a_variant_are_loaded(folder):
    expected = load_file(folder / WEIGHTS["transformer"])["proj_out.weight"]
    path = folder / WEIGHTS["transformer"]
    path.rename(path.with_suffix(".fp16.safetensors"))
    assert torch.equal(load(folder).transformer.proj_out.weight, expected)


def test_a_quantized_model_is_refused_as_a_source(folder):
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "dmquant"}})
    )
    with pytest.raises(UserError, match=r"already quantized \(by dmquant\)"):
        load(folder)


def test_a_dtype_that_is_known_to_overflow_is_warned_of_in_one_line(original):
    said = []
    spec = resolve_model(str(original)).model_copy(update={"warnings": registered_models()["pixart-sigma"].warnings})
    load_full_precision(spec, torch.bfloat16, "cpu", said.append)
    assert said == []
    load_full_precision(spec, torch.float16, "cpu", said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: pixart in fp16: ")
    assert "\n" not in said[0]


def test_a_model_of_the_generic_family_loads_without_a_known_backbone(folder, monkeypatch):
    monkeypatch.setattr("dmquant.pipelines.models.loading.family_of", None)
    spec = resolve_model(str(folder), "generic")
    assert type(load_full_precision(spec, torch.float32, "cpu").transformer).__name__ == "PixArtTransformer2DModel"


def test_a_known_pipeline_with_a_backbone_that_no_family_knows(folder, monkeypatch):
    spec = resolve_model(str(folder))
    monkeypatch.setattr("dmquant.diffusers.families.families", lambda: {"unet": families()["unet"]})
    with pytest.raises(UserError, match=r"PixArtTransformer2DModel, which no model family knows; known are UNet2D"):
        load_full_precision(spec, torch.float32, "cpu")


def test_the_names_of_classes_survive_loading_and_saving(tmp_path):
    built = tiny_dit(tmp_path / "dit")
    load(tmp_path / "dit").save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").labels == built.labels != {}


def test_devices(monkeypatch):
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UserError, match="CUDA is not available") as caught:
        resolve_device("cuda")
    assert caught.value.exit_code == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match=r"no cuda:2.*2 CUDA device"):
        resolve_device("cuda:2")


def test_dtypes():
    assert resolve_dtype("bf16", "cpu") == torch.bfloat16
    assert resolve_dtype("fp16", "cuda:0") == torch.float16
    with pytest.raises(UsageError, match="fp16 on a CPU"):
        resolve_dtype("fp16", "cpu")
    with pytest.raises(UsageError, match="unknown dtype 'fp8'"):
        resolve_dtype("fp8", "cpu")


def test_a_part_that_a_library_cannot_read_is_one_line_whatever_it_raises(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    damaged = json.loads(path.read_text()) | {"post_processor": {"type": "none\nof these"}}
    path.write_text(json.dumps(damaged))  # tokenizers raises Exception itself
    with pytest.raises(UserError, match=f"diffusers cannot load {folder}: ") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1
