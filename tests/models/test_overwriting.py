"""`quantize --overwrite` replaces a model that dmquant made, and nothing else."""

import shutil

import pytest

from dmquant.errors import UsageError, UserError
from dmquant.pipelines.commands import stages
from dmquant.pipelines.models import saving
from dmquant.pipelines.runs.settings import resolve

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "made"
    stages.quantize(resolve(quick()), out, False)
    return out


@pytest.fixture
def model(made, tmp_path):
    """A quantized model, to be replaced."""
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture
def source(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "source")
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", [".", "transformer", "new/model", ".."])
def test_the_source_is_never_written_to_or_over(quick, source, out):
    before = contents(source)
    with pytest.raises(UserError, match=r"one folder, or one|something else|did not quantize"):
        stages.quantize(resolve(quick(model=str(source))), source / out, True)
    assert contents(source) == before


def test_a_link_to_the_source_is_the_source(quick, source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    with pytest.raises(UserError, match=r"did not quantize|one folder"):
        stages.quantize(resolve(quick(model=str(source))), tmp_path / "link", True)
    assert contents(source) == before


def test_a_pipeline_that_dmquant_did_not_quantize_is_not_replaced(quick, source):
    before = contents(source)
    with pytest.raises(UserError, match="that dmquant did not quantize"):
        stages.quantize(resolve(quick()), source, True)
    assert contents(source) == before


def test_files_of_ones_own_are_kept_beside_it(quick, model, capsys):
    (model / "notes.txt").write_text("mine")
    (model / "transformer" / "curves.json").write_text("{}")
    (model / "samples").mkdir()
    (model / "samples" / "00000.png").write_bytes(b"png")
    before = (model / WEIGHTS).read_bytes()
    stages.quantize(resolve(quick(w="int8")), model, True)
    assert (model / WEIGHTS).read_bytes() != before
    kept = model.with_name("model.replaced")
    assert {str(name) for name in contents(kept)} == {"notes.txt", "transformer/curves.json", "samples/00000.png"}
    assert f"what it held that is not of a pipeline is in {kept}" in capsys.readouterr().out
    assert not (model / "notes.txt").exists()


def test_a_model_without_files_of_ones_own_is_replaced_whole(quick, model, made):
    before = set(contents(model))
    stages.quantize(resolve(quick(w="int8")), model, True)
    assert set(contents(model)) == before == set(contents(made))
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_replacement_that_fails_leaves_the_model_of_before(quick, model, monkeypatch):
    def fail(pipeline, folder):
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("no more power")

    before = contents(model)
    monkeypatch.setattr(saving, "save_pipeline", fail)
    with pytest.raises(RuntimeError):
        stages.quantize(resolve(quick(w="int8")), model, True)
    assert contents(model) == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_folder_that_is_called_like_an_unfinished_model_is_not_removed(quick, tmp_path):
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is in the way"):
        stages.quantize(resolve(quick()), tmp_path / "model", False)
    assert (tmp_path / "model.part" / "thesis.tex").read_text() == "years of work"


def test_an_unfinished_model_of_a_killed_command_is_removed(quick, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(pipeline, folder):
        (folder / "half").write_bytes(b"half")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_pipeline", killed)
        patch.setattr(saving.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KilledError):
            stages.quantize(resolve(quick()), tmp_path / "model", False)
    assert (tmp_path / "model.part" / "half").exists()
    stages.quantize(resolve(quick()), tmp_path / "model", False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list((tmp_path / "model").glob(".*"))


def test_the_folder_one_is_in_is_no_place_for_a_model(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (".", ".."):
        with pytest.raises(UsageError, match=r"is the folder you are in, or above it: name a new one"):
            stages.quantize(resolve(quick()), tmp_path.__class__(out), False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_is_not_written_over_its_source(quick, tiny_model, tmp_path, overwrite):
    run = tmp_path / "run"
    source = shutil.copytree(tiny_model, run / "model")
    before = contents(run)
    for out in (run, source):
        with pytest.raises(UserError, match="would write over its full-precision model"):
            stages.run(resolve(quick(model=str(source))), out, overwrite)
    assert contents(run) == before
