"""Pipelines as the Hub's client stores them: blobs, links to them by commit, shards and variants. No network."""

import functools
import hashlib
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch

import dmquant
from dmquant.errors import UserError
from dmquant.host.files import sha256
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import resolve_model
from tests.tiny import tiny_pixart, tiny_sd

REPOSITORY = "owner/tiny"
COMMIT = hashlib.sha1(b"commit").hexdigest()
SHARDED = {"max_shard_size": "30KB"}
BUILDERS = {"pixart": (tiny_pixart, "transformer"), "sd": (tiny_sd, "unet")}
# What save_pretrained is called with, one time after another into one folder, and the dtypes that are saved.
LAYOUTS = {
    "default": [(torch.float32, {})],
    "fp16 variant alone": [(torch.float16, {"variant": "fp16"})],
    "default and fp16 variant": [(torch.float16, {"variant": "fp16"}), (torch.float32, {})],
    "shards": [(torch.float32, SHARDED)],
    "shards of the fp16 variant": [(torch.float16, {"variant": "fp16"} | SHARDED)],
    "fp16 files without a suffix": [(torch.float16, {})],
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's client, which may not reach the Hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def put_in_cache(cache, folder):
    """Move a pipeline folder's files to the client's own layout: a blob each, and links to them in the snapshot."""
    home = cache / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for file in filter(lambda path: path.is_file(), folder.rglob("*")):
        blob = home / "blobs" / sha256(file)
        file.replace(blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def publish(build, layout, folder):
    """A tiny pipeline's folder in one of LAYOUTS."""
    for dtype, options in LAYOUTS[layout]:
        build().to(dtype).save_pretrained(folder, **options)


def quantized(model, dtype, component):
    """Every tensor of the backbone after `rtn`."""
    pipe = load_full_precision(resolve_model(str(model)), dtype, "cpu")
    dmquant.quantize_pipeline(pipe, "rtn")
    return getattr(pipe, component).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What `quantized` gives of the folder of a pipeline that was saved in one dtype, read in another."""

    @functools.cache
    def of(kind, stored, dtype):
        build, component = BUILDERS[kind]
        folder = tmp_path_factory.mktemp("plain")
        build().to(stored).save_pretrained(folder)
        return quantized(folder, dtype, component)

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_layout_gives_the_same_quantized_bytes_as_a_plain_folder(kind, layout, cache, tmp_path, plain):
    build, component = BUILDERS[kind]
    publish(build, layout, tmp_path / "published")
    stored = LAYOUTS[layout][-1][0]
    names = [path.name for path in (tmp_path / "published" / component).iterdir()]
    assert ("shards" in layout) == any("-of-" in name for name in names)
    assert ("variant" in layout) == any("fp16" in name for name in names)
    put_in_cache(cache, tmp_path / "published")
    for dtype in (torch.float32, torch.bfloat16):
        assert same(quantized(REPOSITORY, dtype, component), plain(kind, stored, dtype))


@pytest.mark.parametrize("layout", ["shards of the fp16 variant", "fp16 files without a suffix"])
def test_a_backbone_quantized_while_it_loads_is_made_from_the_stored_numbers(layout, cache, tmp_path):
    """Not from those numbers in the dtype that is asked for."""
    publish(tiny_sd, layout, tmp_path / "published")
    snapshot = put_in_cache(cache, tmp_path / "published")
    options = {"variant": "fp16"} if "variant" in layout else {}
    unet = tiny_sd().unet.half().float()
    dmquant.quantize_(unet, "w4a6")
    loaded = type(unet).from_pretrained(
        snapshot / "unet", quantization_config=dmquant.QuantConfig("w4a6"), dtype=torch.bfloat16, **options
    )
    packed = [name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.uint8]
    assert packed
    assert all(torch.equal(loaded.state_dict()[name], unet.state_dict()[name]) for name in packed)


def test_a_variant_that_only_the_backbone_has_is_used_for_the_backbone_alone(cache, tmp_path):
    published = tmp_path / "published"
    publish(tiny_sd, "default", published)
    (published / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tiny_sd().unet.half().save_pretrained(published / "unet", variant="fp16")
    put_in_cache(cache, published)
    pipe = load_full_precision(resolve_model(REPOSITORY), torch.float32, "cpu")
    assert torch.equal(pipe.unet.conv_in.weight, tiny_sd().unet.conv_in.weight.half().float())
    assert torch.equal(pipe.vae.decoder.conv_in.weight, tiny_sd().vae.decoder.conv_in.weight)


def test_a_blob_that_is_gone_is_a_model_that_is_not_cached(cache, tmp_path):
    """The client removes blobs and leaves the links when a clean-up is stopped half-way."""
    publish(tiny_sd, "shards", tmp_path / "published")
    snapshot = put_in_cache(cache, tmp_path / "published")
    link = sorted((snapshot / "unet").glob("*-of-*.safetensors"))[1]
    link.resolve().unlink()
    with pytest.raises(UserError, match=rf"{REPOSITORY} .*(not in the local cache|{link.name})") as caught:
        load_full_precision(resolve_model(REPOSITORY), torch.float32, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_command_quantizes_a_cached_repository_with_the_hub_switched_off(cache, tmp_path):
    publish(tiny_sd, "shards of the fp16 variant", tmp_path / "published")
    put_in_cache(cache, tmp_path / "published")
    command = [sys.executable, "-m", "dmquant", "quantize", REPOSITORY, "--recipe", "rtn", "--dtype", "fp32"]
    subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    made = dmquant.load_pipeline(tmp_path / "out")
    assert same(
        {name: tensor.float() for name, tensor in made.unet.state_dict().items()},
        {name: tensor.float() for name, tensor in quantized(REPOSITORY, torch.float32, "unet").items()},
    )


def test_load_pipeline_takes_a_repository_and_checks_its_files(cache, tmp_path):
    tiny_pixart(tmp_path / "model")
    snapshot = put_in_cache(cache, tmp_path / "model")
    loaded = dmquant.load_pipeline(REPOSITORY, dtype=torch.bfloat16, verify=True)
    assert loaded.transformer.dtype == torch.bfloat16
    (snapshot / "vae/config.json").resolve().write_text("{}")
    with pytest.raises(UserError, match=r"/vae holds \d+ tensor"):
        dmquant.load_pipeline(REPOSITORY)
