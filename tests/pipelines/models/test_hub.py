"""The Hub without a network: a cache laid out as huggingface_hub lays it out, and its client replaced."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch

from dmquant.errors import UserError
from dmquant.pipelines.models import hub
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import registered_models, resolve_model
from tests.tiny import IMAGE_SIZE, tiny_pixart

COMMIT = "0" * 40
NOT_FOUND = (404, "RepoNotFound", {"error": "Repository not found"})


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
    with pytest.raises(UserError, match=r"21\.8 GB but .* has only 3\.00 GB free.*HF_HOME"):
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


def gated(repo, status):
    """What the Hub answers for a gated repository: its listing to anybody, its files to nobody."""
    file = {"type": "file", "path": "model_index.json", "size": 400, "oid": "0" * 40}
    return {
        f"/api/models/{repo}/tree/": (200, None, [file]),
        f"/api/models/{repo}": (200, None, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file["path"]}]}),
        f"/{repo}/resolve/": (status, "GatedRepo", {"error": f"Access to model {repo} is restricted"}),
    }


class TestHubServer:
    """A server in this process that answers as the Hub does, for the client's real requests."""

    @pytest.fixture
    def server(self, cache, monkeypatch):
        served = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, error, body = next((served[part] for part in served if part in self.path), NOT_FOUND)
                content = json.dumps(body).encode()
                self.send_response(status)
                if error:
                    self.send_header("X-Error-Code", error)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args):
                """Nothing: the test's output is not a log."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
            threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
            address = f"http://127.0.0.1:{http.server_port}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
            monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
            monkeypatch.setattr(
                huggingface_hub.constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                address + "/{repo_id}/resolve/{revision}/{filename}",
            )
            yield served
            http.shutdown()

    def test_a_repository_that_is_not_there(self, server):
        with pytest.raises(UserError, match=r"the Hub has no model 'owner/model', or it is private.*hf auth login"):
            resolve_model("owner/model")

    def test_a_gated_repository(self, server):
        server |= gated("owner/model", 401)
        with pytest.raises(UserError, match=r"owner/model is gated: accept its licence.*hf auth login") as refused:
            resolve_model("owner/model")
        assert "\n" not in str(refused.value)

    def test_a_registered_model_that_is_gated(self, server, monkeypatch):
        spec = registered_models()["sd15"]
        server |= gated(spec.source, 403)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
        said = []
        with pytest.raises(UserError, match=rf"{spec.source} is gated"):
            load_full_precision(spec, torch.bfloat16, "cpu", said.append)
        assert len(said) == 1

    def test_a_hub_that_is_out_of_order_is_one_line(self, server):
        server["/api/models/owner/model"] = (500, None, {"error": "Internal Error"})
        with pytest.raises(UserError, match=r"cannot be had from the Hub \(.*500.*\): give a local copy") as refused:
            resolve_model("owner/model")
        assert "\n" not in str(refused.value)
