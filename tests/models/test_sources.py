"""A run knows every file that its model is loaded from, by content, and hashes none twice."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from dmquant.host import hashes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs import image_stage, sides
from dmquant.pipelines.runs.runfolder import claim
from dmquant.pipelines.runs.settings import resolve
from dmquant.pipelines.runs.source import resumed_source, source_of


@pytest.fixture(scope="module")
def run_of_copy(quick, tiny_model, tmp_path_factory):
    """A finished run, and the folder of its model."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_model, folder / "model")
    (folder / "model" / "tokenizer" / "merges.txt").write_text("a b\n")
    stages.run(resolve(quick(model=str(folder / "model"))), folder / "run", False)
    return folder


@pytest.fixture
def again(run_of_copy, tmp_path):
    shutil.copytree(run_of_copy, tmp_path / "it")
    return tmp_path / "it"


def refuse(*args, **kwargs):
    raise AssertionError("work was done again")


def rescale(path):
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("text_encoder/model.safetensors", rescale),
        ("vae/diffusion_pytorch_model.safetensors", rescale),
        ("tokenizer/merges.txt", lambda path: path.write_text("a c\n")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_text_encoder_vae_or_tokenizer_is_another_model(quick, again, monkeypatch, capsys, name, change):
    settings = resolve(quick(model=str(again / "model")))
    change(again / "model" / name)
    monkeypatch.setattr(image_stage, "make_images", refuse)
    with pytest.raises(AssertionError, match="done again"):
        stages.run(settings, again / "run", False)
    assert f"changed since the last run: {name}; what depends on it" in capsys.readouterr().out


def test_the_same_files_written_again_change_nothing(quick, again, monkeypatch, capsys):
    for path in (again / "model").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes())
    monkeypatch.setattr(sides, "load_source", refuse)
    stages.run(resolve(quick(model=str(again / "model"))), again / "run", False)
    assert "changed" not in capsys.readouterr().out


def as_left_by_version_0_2(folder):
    """A run that knew the backbone's weights and all configurations, and nothing of what else there is."""
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    del settings["fingerprints"]
    known = settings["model"]["sha256"]
    settings["model"]["sha256"] = {
        name: known[name] for name in known if ".json" in name or name.startswith("transformer")
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    state = json.loads((folder / "state.json").read_text())
    del state["notes"]["source"], state["stages"]["model"]["parts_sha256"]
    (folder / "state.json").write_text(json.dumps(state))
    return settings["model"]["sha256"]


def test_a_run_of_an_earlier_version_keeps_what_it_made(quick, again):
    settings, model = resolve(quick(model=str(again / "model"))), again / "model"
    before = fingerprint(files=as_left_by_version_0_2(again / "run"))

    def key():
        with claim(again / "run", settings.model.name) as folder:
            return resumed_source(settings, model, folder, Console()).key

    assert key() == key() == before
    rescale(model / "vae" / "diffusion_pytorch_model.safetensors")
    assert key() not in (before, fingerprint(files={}))


def test_a_file_is_read_once_however_many_commands_hash_it(quick, tiny_model, monkeypatch):
    settings, read, real = resolve(quick()), [], hashes.sha256
    monkeypatch.setattr(hashes, "LARGE", 1)
    monkeypatch.setattr(hashes, "SETTLED", 0.0)
    monkeypatch.setattr(hashes, "sha256", lambda path, on_bytes: (read.append(path), real(path, on_bytes))[1])
    hashes._in_this_process.clear()
    first = source_of(settings, tiny_model, Console())
    assert {path.suffix for path in read} >= {".safetensors", ".json"}
    assert len(read) == len(set(read)) == len(first.sha256)
    hashes._in_this_process.clear()  # as a new process has it
    assert source_of(settings, tiny_model, Console()) == first
    assert len(read) == len(first.sha256)
