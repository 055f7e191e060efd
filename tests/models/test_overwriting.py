"""`quantize --overwrite` replaces a model that dmquant made, and nothing else."""

import contextlib
import multiprocessing
import shutil
from pathlib import Path

import pytest

from dmquant.errors import UsageError, UserError
from dmquant.host import owned
from dmquant.pipelines.commands import stages
from dmquant.pipelines.models import saving
from dmquant.pipelines.runs.settings import Options, resolve, resolve_all

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


def test_files_of_ones_own_stay_where_they_are(quick, model):
    (model / "notes.txt").write_text("mine")
    (model / "README.md").write_text("my own card")
    (model / "empty").mkdir()
    (model / "transformer" / "curves.json").write_text("{}")
    (model / "samples").mkdir()
    (model / "samples" / "00000.png").write_bytes(b"png")
    before = (model / WEIGHTS).read_bytes()
    stages.quantize(resolve(quick(w="int8")), model, True)
    assert (model / WEIGHTS).read_bytes() != before
    assert (model / "notes.txt").read_text() == "mine"
    assert (model / "transformer" / "curves.json").read_text() == "{}"
    assert (model / "samples" / "00000.png").read_bytes() == b"png"
    assert (model / "empty").is_dir()
    assert (model / "README.md.replaced").read_text() == "my own card"
    assert "my own card" not in (model / "README.md").read_text()
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


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


def test_a_model_without_checksums_is_kept_whole(quick, model, capsys):
    (model / "checksums.json").unlink()
    before = contents(model)
    stages.quantize(resolve(quick(w="int8")), model, True)
    assert contents(model.with_name("model.replaced")) == before
    assert "has no checksums" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.part", "model.calibration", ".model.dmquant"])
def test_a_folder_that_is_called_like_a_workspace_is_not_touched(quick, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    try:
        stages.quantize(resolve(quick()), tmp_path / "model", False)
    except UserError as error:
        assert "is in the way, and is not of dmquant" in str(error)  # noqa: PT017
    assert contents(tmp_path / name) == {Path("thesis.tex"): b"years of work"}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_killed_replacement_is_finished_by_the_next_command(quick, model, made, monkeypatch, renames):
    class KilledError(BaseException):
        pass

    (model / "notes.txt").write_text("mine")
    real, left = Path.rename, [renames]

    def rename(path, target):
        if not left[0] and path.name in ("new", "model", "old"):
            raise KilledError
        left[0] -= path.name in ("new", "model", "old")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(owned.shutil, "rmtree", lambda *args, **kwargs: None)
        with contextlib.suppress(KilledError):
            stages.quantize(resolve(quick(w="int8")), model, True)
    stages.quantize(resolve(quick(w="int8")), model, True)
    assert set(contents(model)) == {*contents(made), Path("notes.txt")}
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def _hold(path, ready, release):
    with owned.workspace(path):
        ready.set()
        release.wait(60)


def test_two_commands_do_not_write_one_model(quick, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, release = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "model", ready, release))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another dmquant is writing"):
        stages.quantize(resolve(quick()), tmp_path / "model", False)
    release.set()
    other.join()
    assert not any(tmp_path.iterdir())


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
        with pytest.raises(UserError, match="one folder, or one in the other"):
            stages.run(resolve(quick(model=str(source))), out, overwrite)
    assert contents(run) == before


def generated(quick, out, overwrite=False, **changes):
    given = {"model": str(quick().model), "prompts": quick().prompts, "steps": 1, "device": "cpu", "dtype": "fp32"}
    stages.generate(resolve(Options(recipe="rtn", **(given | changes))), out, overwrite)


def test_a_run_that_starts_anew_keeps_files_of_ones_own_in_its_model_and_other_runs_below(quick, tmp_path):
    out = tmp_path / "run"
    stages.run(resolve(quick()), out, False)
    other = shutil.copytree(out, out / "runs" / "other")
    (out / "model" / "notes.txt").write_text("mine")
    before = contents(other)
    stages.run(resolve(quick()), out, True)
    assert contents(other) == before
    assert (out / "model" / "notes.txt").read_text() == "mine"
    assert not list(out.glob("model.replaced*"))
    (out / "images" / "fp" / "cat.png").write_bytes((out / "images" / "fp" / "00000.png").read_bytes())
    with pytest.raises(UserError, match=r"cat.png is not of this run"):
        stages.run(resolve(quick()), out, False)


def test_a_comparison_that_starts_anew_keeps_files_of_ones_own_in_its_models(quick, tmp_path):
    compare = resolve_all(quick(), "rtn")
    stages.compare(compare, tmp_path / "run", False)
    notes = tmp_path / "run" / "recipes" / "rtn" / "model" / "notes.txt"
    notes.write_text("mine")
    stages.compare(compare, tmp_path / "run", True)
    assert notes.read_text() == "mine"
    assert (notes.parent / "checksums.json").exists()


def test_a_model_behind_a_link_is_replaced_there(quick, tmp_path):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    stages.run(resolve(quick()), out, False)
    (out / "model").rename(elsewhere)
    (out / "model").symlink_to(elsewhere)
    for changes, overwrite in (({}, True), ({"w": "int8"}, False)):
        stages.run(resolve(quick(**changes)), out, overwrite)
        assert (out / "model").is_symlink()
        assert not [path for path in tmp_path.rglob("*") if ".replaced" in path.name]
        assert (elsewhere / "checksums.json").exists()


def test_generate_keeps_what_is_there_and_replaces_only_its_own_and_only_when_told(quick, tmp_path, capsys):
    out = tmp_path / "images"
    generated(quick, out)
    (out / "00002.png").write_bytes(b"mine")
    before = contents(out)
    generated(quick, out, num_prompts=1)
    assert "holds 1 more image of earlier commands" in capsys.readouterr().out
    for changes in ({"seed": 7}, {"steps": 2}):
        with pytest.raises(UserError, match="is an image of another model, prompt, seed or setting"):
            generated(quick, out, **changes)
    assert contents(out).items() >= {name: text for name, text in before.items() if name.suffix == ".png"}.items()
    generated(quick, out, overwrite=True, seed=7, num_prompts=1)
    assert {name.name for name in contents(out) if name.suffix == ".png"} == {"00000.png", "00002.png"}
    assert contents(out)[Path("00000.png")] != before[Path("00000.png")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_generate_never_replaces_an_image_of_somebody_else(quick, tmp_path, overwrite):
    (tmp_path / "00001.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"00001.png is not of dmquant"):
        generated(quick, tmp_path, overwrite)
    assert contents(tmp_path)[Path("00001.png")] == b"mine"
