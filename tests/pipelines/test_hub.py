"""The Hub without a network: a cache laid out as huggingface_hub lays it out, and its client replaced."""

import shutil
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch

from dmquant.errors import UserError
from dmquant.pipelines import hub
from dmquant.pipelines.loading import load_full_precision
from dmquant.pipelines.registry import registered_models, resolve_model
from tests.tiny import IMAGE_SIZE, tiny_pixart

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


def put_in_cache(cache, repo, folder):
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(COMMIT)
    return shutil.copytree(folder, home / "snapshots" / COMMIT)


def answers(monkeypatch, **files):
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, repo, **options: SimpleNamespace(siblings=siblings)
    )


@pytest.mark.usefixtures("cache", "no_network")
def test_without_cache_or_network_one_line_says_what_how_big_and_what_to_do():
    spec = registered_models()["pixart-sigma"]
    with pytest.raises(UserError) as caught:
        load_full_precision(spec, torch.bfloat16, "cpu")
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert "\n" not in message
    for part in (spec.source, "21.8 GB", "dmquant run /path/to/folder", "HF_HOME", "no route"):
        assert part in message


@pytest.mark.usefixtures("cache", "no_network")
def test_an_unknown_hub_id_without_network_is_one_line():
    with pytest.raises(UserError, match=r"owner/model \(size unknown\).*/path/to/folder"):
        resolve_model("owner/model")


@pytest.mark.usefixtures("no_network")
def test_a_cached_pipeline_needs_no_network(cache, original):
    put_in_cache(cache, "owner/tiny-pixart", original)
    spec = resolve_model("owner/tiny-pixart")
    assert (spec.name, spec.source, spec.height) == ("tiny-pixart", "owner/tiny-pixart", IMAGE_SIZE)
    loaded = load_full_precision(spec, torch.float32, "cpu")
    assert torch.equal(loaded.transformer.proj_out.weight, tiny_pixart().transformer.proj_out.weight)
    assert hub.cached_pipelines() == ["owner/tiny-pixart"]


@pytest.mark.usefixtures("no_network")
def test_a_half_downloaded_pipeline_is_not_taken_for_a_whole_one(cache, original):
    snapshot = put_in_cache(cache, "owner/tiny-pixart", original)
    (snapshot / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be had from the Hub"):
        load_full_precision(resolve_model("owner/tiny-pixart"), torch.float32, "cpu")


def test_a_download_is_announced_with_its_size_before_it_starts(cache, original, monkeypatch):
    said = []

    def download(repo, **options):
        assert said == [f"downloading {repo} (about 21.8 GB) from the Hub into {cache}"]
        assert options == {"use_safetensors": True}
        return str(original)

    answers(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    load_full_precision(registered_models()["pixart-sigma"], torch.float32, "cpu", said.append)
    assert len(said) == 1


def test_a_disk_that_is_too_small_is_found_out_before_the_download(cache, monkeypatch):
    answers(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    with pytest.raises(UserError, match=r"21\.8 GB but .* has only 3\.0 GB free.*HF_HOME"):
        load_full_precision(registered_models()["pixart-sigma"], torch.float32, "cpu")


def test_an_unregistered_repository_is_sized_by_the_weights_that_would_be_loaded(cache, original, monkeypatch):
    weights = "diffusion_pytorch_model"
    answers(
        monkeypatch,
        **{
            f"transformer/{weights}.safetensors": 3_000_000_000,
            f"transformer/{weights}.fp16.safetensors": 1_500_000_000,
            f"transformer/{weights}.bin": 3_000_000_000,
            "text_encoder/model-00001-of-00002.safetensors": 1_000_000_000,
            "text_encoder/model-00002-of-00002.safetensors": 500_000_000,
            "all-in-one.safetensors": 5_000_000_000,
            "model_index.json": 400,
        },
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(original))
    assert resolve_model("owner/model").download_bytes == 4_500_000_000


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "the Hub has no model 'owner/model'"),
        (huggingface_hub.errors.GatedRepoError, "owner/model is gated"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_a_repository_that_the_hub_refuses_is_called_what_it_is(error, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match=message):
        resolve_model("owner/model")


def test_sizes_are_readable():
    assert [hub.readable(size) for size in (None, 15_600_000, 4_300_000_000)] == [
        "size unknown",
        "about 16 MB",
        "about 4.3 GB",
    ]
