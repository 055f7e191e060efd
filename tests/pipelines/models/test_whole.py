"""A pipeline whose files are not the models that its configurations describe is refused, in one line, at every door."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmquant.convert import quantize_
from dmquant.diffusers.saving import save_pipeline
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.pipelines.commands import listing
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.loading import load_full_precision, load_pipeline
from dmquant.pipelines.models.registry import resolve_model
from dmquant.pipelines.models.whole import check_models
from dmquant.pipelines.runs.model_stage import load_quantized
from dmquant.pipelines.runs.settings import Options, resolve
from tests.tiny import TINY, marked, tiny_pixart, tiny_sd

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LAYERS = {"transformer": "num_layers", "vae": "layers_per_block", "text_encoder": "num_layers"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A quantized pipeline of two blocks on disk, not to be changed."""
    folder = tmp_path_factory.mktemp("quantized") / "pixart"
    pipeline = tiny_pixart(blocks=2)
    quantize_(pipeline.transformer, "w4a6")
    save_pipeline(pipeline, folder)
    return folder


@pytest.fixture
def plain(original, tmp_path):
    return shutil.copytree(original, tmp_path / "plain")


@pytest.fixture
def packed(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "packed")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, match):
    """The line that both Python doors refuse a folder with; those of the commands call the same."""
    with pytest.raises(UserError, match=match) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=match):
        listing.inspect(folder, layers=False)


@pytest.mark.parametrize("name", marked())
def test_every_pipeline_is_whole(name, tmp_path):
    TINY[name].build(tmp_path / "model")
    check_models(tmp_path / "model")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_an_unexpected_and_a_misshapen_tensor_in_any_part(part, plain):
    file = plain / WEIGHTS[part]
    whole = file.read_bytes()
    name = min(load_file(file))
    edit_tensors(file, lambda tensors: tensors.pop(name))
    refused(plain, rf"/{part} lacks 1 tensor\(s\) of its model, '{name}' among them")
    file.write_bytes(whole)
    edit_tensors(file, lambda tensors: tensors.update({"more.weight": torch.ones(2)}))
    refused(plain, rf"/{part} holds 1 tensor\(s\) that its config.json has no place for, 'more.weight' among them")
    file.write_bytes(whole)
    edit_tensors(file, lambda tensors: tensors.update({name: torch.ones(3, 5)}))
    refused(plain, rf"/{part} holds '{name}' in shape \[3, 5\]")
    file.write_bytes(whole)
    edit_tensors(file, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    refused(plain, rf"/{part} holds '{name}' in int32, which is saved in float32")


@pytest.mark.parametrize("part", WEIGHTS)
def test_more_or_fewer_layers_in_the_config_than_in_the_file(part, plain):
    file, key = plain / part / "config.json", LAYERS[part]
    count = json.loads(file.read_text())[key]
    edit(file, lambda config: config.update({key: count + 1}))
    refused(plain, rf"/{part} lacks \d+ tensor\(s\)|/{part} holds \d+ tensor\(s\)")


def test_half_of_a_model_is_not_run(packed):
    edit(packed / "transformer/config.json", lambda config: config.update(num_layers=1))
    with pytest.raises(UserError, match=r"/transformer holds packed weights .*its config.json does not describe"):
        load_pipeline(packed)
    spec = Options(model=str(packed), recipe="rtn", dtype="fp32", device="cpu")
    with pytest.raises(UserError, match="/transformer holds packed weights"):
        load_quantized(packed, resolve(spec))


def test_packed_weights_without_their_configuration_and_the_reverse(packed, plain):
    description = json.loads((packed / "transformer/config.json").read_text())["quantization_config"]
    edit(packed / "transformer/config.json", lambda config: config.pop("quantization_config"))
    refused(packed, r"/transformer holds packed weights \('.*qweight'\) that its config.json does not describe")
    with pytest.raises(UserError, match="/transformer holds packed weights"):
        load_full_precision(resolve_model(str(packed)), torch.float32, "cpu")
    edit(plain / "transformer/config.json", lambda config: config.update(quantization_config=description))
    refused(plain, r"/transformer is quantized by its config.json, but holds no packed weight")


def test_packed_bytes_of_another_dtype(packed):
    file = packed / WEIGHTS["transformer"]
    whole = file.read_bytes()
    for dtype, said in ((b"I8", "int8"), (b"F8_E4M3", "float8_e4m3fn")):
        length = int.from_bytes(whole[:8], "little")
        header = whole[8 : 8 + length].replace(b'"U8"', b'"%s"' % dtype)
        file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
        refused(packed, rf"/transformer holds '.*' in {said}, which is saved in uint8")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda config: config.update(version=99), "by a later dmquant.*version 99"),
        (lambda config: config.update(version="2"), "version of a quantization_config is 1 to"),
        (lambda config: config.update(version=0), "version of a quantization_config is 1 to"),
        (lambda config: config.pop("recipe"), "holds no recipe"),
        (lambda config: config.update(recipe=None), "holds no recipe"),
        (lambda config: config.update(recipe=["rtn"]), "holds no recipe"),
        (lambda config: config.update(recipe="mine.yaml"), "holds no recipe"),
        (lambda config: config["recipe"].update(weights="fp44"), "unknown format 'fp44'"),
        (lambda config: config["recipe"].update(rules=5), "recipe: rules"),
        (lambda config: config["recipe"].update(rules=[{"match": "*", "keep": "maybe"}]), "recipe: rules"),
        (lambda config: config["recipe"].update(rounding={"method": {"a": []}}), "recipe: rounding"),
    ],
)
def test_a_malformed_description_of_the_quantization(change, match, packed):
    edit(packed / "transformer/config.json", lambda config: change(config["quantization_config"]))
    refused(packed, match)
    with pytest.raises(UserError) as caught:
        load_pipeline(packed)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("transformer", {"num_layers": 10_000_000}),
        ("transformer", {"num_attention_heads": 1_000_000}),
        ("transformer", {"sample_size": 30_000}),
        ("transformer", {"cross_attention_dim": 10**9}),
        ("transformer", {"patch_size": 0}),
        ("text_encoder", {"num_layers": 10**9}),
        ("text_encoder", {"vocab_size": 10**9}),
        ("text_encoder", {"num_heads": -1}),
        ("vae", {"layers_per_block": 10**9}),
        ("vae", {"block_out_channels": [16] * 1000}),
        ("vae", {"latent_channels": 10**12}),
    ],
)
def test_a_config_of_a_far_larger_model_is_refused_within_a_second(part, settings, plain):
    edit(plain / part / "config.json", lambda config: config.update(settings))
    check_models(shutil.copytree(plain, plain.with_name("warm")), leave_out={part})  # imports what builds models
    began = time.perf_counter()
    with pytest.raises(UserError, match=rf"/{part}\b") as caught:
        check_models(plain)
    assert time.perf_counter() - began < 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_images_larger_than_any_are_refused_where_a_folder_is_resolved(tmp_path):
    tiny_sd(tmp_path / "sd")
    edit(tmp_path / "sd/unet/config.json", lambda config: config.update(sample_size=16_000))
    with pytest.raises(UserError, match="makes images of 32000x32000 pixels"):
        resolve_model(str(tmp_path / "sd"))


def test_numbers_of_another_kind_under_the_older_names_of_a_text_encoder(tmp_path):
    tiny_sd(tmp_path / "sd")
    file, name = tmp_path / "sd" / WEIGHTS["text_encoder"], "text_model.encoder.layers.0.mlp.fc1.weight"
    older = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(file).items()}
    save_file(older, file, metadata={"format": "pt"})
    check_models(tmp_path / "sd")
    save_file(older | {name: older[name].to(torch.int32)}, file, metadata={"format": "pt"})
    refused(tmp_path / "sd", rf"/text_encoder holds '{name}' in int32, which is saved in float32")


class TestWhatLibrariesDoWhileTheyLoad:
    """Renamed, tied, ignored and computed tensors are no faults."""

    def test_legacy_names_of_attention_in_an_autoencoder(self, tmp_path):
        from diffusers import AutoencoderKL

        tiny_sd(tmp_path / "sd")
        config = json.loads((tmp_path / "sd/vae/config.json").read_text()) | {"mid_block_add_attention": True}
        AutoencoderKL.from_config(config).save_pretrained(tmp_path / "sd/vae")
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def rename(tensors):
            for name in list(tensors):
                for new, old in names.items():
                    if f"attentions.0.{new}." in name:
                        tensors[name.replace(new, old)] = tensors.pop(name)

        edit_tensors(tmp_path / "sd" / WEIGHTS["vae"], rename)
        check_models(tmp_path / "sd")
        load_pipeline(tmp_path / "sd")

    def test_buffers_that_were_saved_once(self, tmp_path, plain):
        tiny_sd(tmp_path / "sd")
        ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        edit_tensors(tmp_path / "sd" / WEIGHTS["text_encoder"], lambda tensors: tensors.update(ids))
        check_models(tmp_path / "sd")
        embedding = {"caption_projection.y_embedding": torch.ones(120, 32)}
        edit_tensors(plain / WEIGHTS["transformer"], lambda tensors: tensors.update(embedding))
        check_models(plain)

    def test_a_tied_tensor_under_either_of_its_names(self, plain):
        def other_name(tensors):
            tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

        edit_tensors(plain / WEIGHTS["text_encoder"], other_name)
        check_models(plain)
        expected = load_file(plain / WEIGHTS["text_encoder"])["encoder.embed_tokens.weight"]
        assert torch.equal(load_pipeline(plain).text_encoder.shared.weight, expected)

    def test_a_text_encoder_taken_from_a_larger_model(self, tmp_path):
        tiny_sd(tmp_path / "sd")
        more = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2), "logit_scale": torch.ones(())}
        edit_tensors(tmp_path / "sd" / WEIGHTS["text_encoder"], lambda tensors: tensors.update(more))
        with pytest.raises(UserError, match=r"/text_encoder holds 2 tensor\(s\)"):
            check_models(tmp_path / "sd")
        edit(tmp_path / "sd/text_encoder/config.json", lambda config: config.update(architectures=["CLIPModel"]))
        check_models(tmp_path / "sd")

    def test_parts_that_others_quantized_are_left_to_them(self, plain):
        edit(plain / "transformer/config.json", lambda config: config.update(quantization_config={"quant_method": "x"}))
        edit_tensors(plain / WEIGHTS["transformer"], lambda tensors: tensors.clear())
        check_models(plain)

    @pytest.mark.parametrize("variants", [{"transformer": "fp16"}, {"vae": "fp16", "text_encoder": "bf16"}])
    def test_each_part_may_be_of_another_variant(self, variants, plain):
        for part, variant in variants.items():
            path = plain / WEIGHTS[part]
            path.rename(path.with_suffix(f".{variant}.safetensors"))
        check_models(plain)
        loaded = load_full_precision(resolve_model(str(plain)), torch.float32, "cpu")
        assert torch.isfinite(loaded.vae.decoder.conv_in.weight).all()


class TestFilesThatAreNone:
    """Not opened, or read no further than need be."""

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO on this system")
    @pytest.mark.parametrize(
        "name", ["vae/config.json", WEIGHTS["vae"], "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
    )
    def test_fifos_and_devices(self, name, plain):
        (plain / name).unlink()
        os.mkfifo(plain / name)
        refused(plain, rf"{name} is no regular file")
        (plain / name).unlink()
        (plain / name).symlink_to("/dev/zero")
        refused(plain, rf"{name} is no regular file")

    @pytest.mark.parametrize(
        ("content", "match"),
        [("[" * 100_000, "nested too deep"), ('{"a":' * 100_000, "nested too deep"), (" " * (1 << 25), "has 34 MB")],
    )
    def test_json_that_is_deep_or_huge(self, content, match, plain):
        for name in ("vae/config.json", "model_index.json", "tokenizer/tokenizer_config.json"):
            whole = (plain / name).read_text()
            (plain / name).write_text(content)
            refused(plain, rf"{name} .*{match}")
            (plain / name).write_text(whole)

    def test_a_scheduler_that_is_none(self, plain):
        (plain / "scheduler/scheduler_config.json").write_text("{}")
        refused(plain, "scheduler_config.json names no scheduler")

    def test_a_scheduler_of_more_timesteps_than_any(self, plain):
        edit(plain / "scheduler/scheduler_config.json", lambda config: config.update(num_train_timesteps=10**9))
        refused(plain, "scheduler_config.json says num_train_timesteps: 1000000000")

    def test_what_diffusers_itself_cannot_load_is_one_line(self, plain):
        edit(plain / "scheduler/scheduler_config.json", lambda config: config.update(beta_start=[]))
        with pytest.raises(UserError, match=rf"^diffusers cannot load {plain}: \w+Error: [^\n]*$"):
            load_pipeline(plain)

    def test_names_of_parts_and_shards_stay_in_their_folder(self, plain):
        edit(plain / "model_index.json", lambda index: index.update({"../vae": ["diffusers", "AutoencoderKL"]}))
        refused(plain, r"lists '\.\./vae', which is no part of a pipeline")
        edit(plain / "model_index.json", lambda index: index.pop("../vae"))
        index = {"weight_map": {"a": "../text_encoder/model.safetensors"}}
        (plain / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        refused(plain, "lists no files of its own folder")

    def test_a_folder_that_cannot_be_read_or_vanishes(self, plain, monkeypatch):
        def gone(part):
            raise PermissionError(13, "Permission denied", str(part))

        monkeypatch.setattr(folders, "_check_files", gone)
        refused(plain, r"^cannot read \S+/\w+: Permission denied$")


def test_inspect_reads_headers_alone(plain, monkeypatch):
    """The check of the whole is no load."""
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr(Console, "say", lambda self, line: None)
    listing.inspect(plain, layers=False)
