"""Models of one comparison share what quantization leaves as it is: on disk and in memory, and each stays whole."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dmquant.pipelines.commands import stages
from dmquant.pipelines.models import shared_parts
from dmquant.pipelines.runs.settings import resolve_all
from dmquant.pipelines.sweep.space import Choice, design_space
from tests.tiny import tiny_pixart

RECIPES = "rtn,rtn:int8:none,w8a8,w4a8,w4a16"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pipeline whose text encoder is nearly all of it."""
    folder = tmp_path_factory.mktemp("models") / "large"
    pipeline = tiny_pixart()
    embedding = torch.nn.Embedding(100_000, pipeline.text_encoder.config.d_model)
    pipeline.text_encoder.set_input_embeddings(embedding)
    pipeline.text_encoder.config.vocab_size = embedding.num_embeddings
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compared(quick, large, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compared"
    stages.compare(resolve_all(quick(model=str(large)), RECIPES), out, False)
    return out


def models(folder):
    return sorted(path.parent for path in folder.glob("recipes/*/model/model_index.json"))


def bytes_on_disk(*folders):
    """Blocks of all files, each counted once however many names it has."""
    stats = [path.stat() for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return sum({(stat.st_dev, stat.st_ino): 512 * stat.st_blocks for stat in stats}.values())


def test_five_recipes_take_little_more_than_one_pipeline(compared, large):
    assert len(models(compared)) == 5
    assert bytes_on_disk(*models(compared), compared / ".dmquant" / "shared") <= 1.2 * bytes_on_disk(large)


def test_five_recipes_write_little_more_than_one_pipeline(quick, large, tmp_path):
    def written():
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    if not os.access("/proc/self/io", os.R_OK):
        pytest.skip("the system does not count what is written")
    before = written()
    stages.compare(resolve_all(quick(model=str(large)), RECIPES), tmp_path / "run", False)
    models_written = (
        written()
        - before
        - sum(
            path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.suffix in (".html", ".png", ".json")
        )
    )
    pipeline = sum(path.stat().st_size for path in large.rglob("*") if path.is_file())
    assert models_written <= 1.2 * pipeline


def test_every_model_is_whole_and_none_needs_another(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "run")
    first, *others = models(compared)
    expected = load_file(first / ENCODER)
    for model in models(folder)[:-1]:
        shutil.rmtree(model)
    shutil.rmtree(folder / ".dmquant" / "shared")
    (left,) = models(folder)
    moved = shutil.copytree(left, tmp_path / "moved")
    pipeline = DiffusionPipeline.from_pretrained(moved)
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, expected["shared.weight"])
    shutil.rmtree(left)  # links that are read-only do not stand in the way
    names = {path.relative_to(first) for path in first.rglob("*")}
    assert all({path.relative_to(each) for path in each.rglob("*")} == names for each in others)


def test_small_files_are_copies_and_large_ones_are_not_to_be_written_to(compared):
    first, second, *_ = models(compared)
    assert (first / ENCODER).samefile(second / ENCODER)
    assert not (first / ENCODER).stat().st_mode & 0o222
    for name in ("text_encoder/config.json", "model_index.json", "vae/config.json", "README.md"):
        assert not (first / name).samefile(second / name)


def test_a_recipe_gives_the_model_that_it_gives_alone(quick, compared, large, tmp_path):
    (settings,) = resolve_all(quick(model=str(large)), "w8a8").values()
    stages.quantize(settings, tmp_path / "alone", False)
    beside = compared / "recipes" / "w8a8" / "model"
    files = {path.relative_to(beside) for path in beside.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    for name in files - {Path("README.md"), Path("checksums.json")}:
        assert (beside / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_without_hard_links_there_are_copies(quick, large, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(shared_parts.os, "link", refuse)
    stages.compare(resolve_all(quick(model=str(large)), "rtn,w8a8"), tmp_path / "run", False)
    first, second = models(tmp_path / "run")
    assert not (first / ENCODER).samefile(second / ENCODER)
    assert (first / ENCODER).read_bytes() == (second / ENCODER).read_bytes()


def test_damaged_parts_are_not_handed_on(quick, compared, large, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "run")
    good = (folder / ".dmquant" / "shared" / ENCODER).read_bytes()
    (folder / ".dmquant" / "shared" / ENCODER).chmod(0o644)
    (folder / ".dmquant" / "shared" / ENCODER).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    stages.compare(resolve_all(quick(model=str(large)), "rtn,w8a16"), folder, False)
    assert (folder / "recipes" / "w8a16" / "model" / ENCODER).read_bytes() == good
    assert (folder / ".dmquant" / "shared" / ENCODER).read_bytes() == good


def test_the_text_encoder_is_loaded_twice_and_not_with_every_recipe(quick, large, tmp_path, monkeypatch):
    from transformers import T5EncoderModel

    real, loads = T5EncoderModel.from_pretrained.__func__, []
    monkeypatch.setattr(
        T5EncoderModel, "from_pretrained", classmethod(lambda cls, *a, **k: (loads.append(a), real(cls, *a, **k))[1])
    )
    stages.compare(resolve_all(quick(model=str(large)), RECIPES), tmp_path / "run", False)
    from_files = [arguments for arguments in loads if arguments[0] is not None]  # the others look at headers alone
    assert len(from_files) == 2  # in full precision, and as it was saved


def test_trials_of_a_sweep_share_them_too_and_leave_none(quick, large, tmp_path, monkeypatch):
    from dmquant.pipelines.sweep import engines

    filled, real = [], shared_parts.SharedParts.fill
    monkeypatch.setattr(
        shared_parts.SharedParts, "fill", lambda self, model: (filled.append(real(self, model)), filled[-1])[1]
    )
    monkeypatch.setitem(engines.ENGINES, "here", lambda work, items, crew: ((item, work(item)) for item in items))
    space = design_space(quick(model=str(large)), Choice(bits="4,8", formats="int4,int8"))
    stages.sweep(space, tmp_path / "run", False, "here", None, 1, False)
    assert filled == [False, True, True]
    assert not (tmp_path / "run" / ".dmquant" / "shared").exists()
