"""The card beside an export: the scores of the run that made the model, or that there are none; and what is exact."""

from dataclasses import replace

import pytest

from dmquant.errors import UsageError, UserError
from dmquant.exchange.folder import listed
from dmquant.pipelines.commands import exporting, listing, stages
from dmquant.pipelines.models import opening
from dmquant.pipelines.runs.evidence_card import MARK
from dmquant.pipelines.runs.settings import Options, resolve, resolve_all
from tests.exchange import labelled
from tests.models.test_compare_files import PROMPTS, images, report
from tests.tiny import tiny_pixart


@pytest.fixture(autouse=True)
def _known_format(monkeypatch):
    monkeypatch.setattr(opening, "formats", lambda: {"labelled": labelled.FORMAT})
    monkeypatch.setattr(exporting, "writable", lambda name: labelled.FORMAT)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    tiny_pixart(folder / "tiny", width=64)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return Options(
        str(folder / "tiny"), prompts=str(folder / "prompts.txt"), steps=2, dtype="fp32", metrics="psnr,lpips"
    )


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    (settings,) = resolve_all(options, "rtn:nvfp4:none").values()
    stages.run(settings, out, False)
    return out


def exported(run, out, overwrite=False):
    exporting.export(run, "labelled", out, overwrite)
    return out.with_suffix(".md").read_text("utf-8")


def test_the_card_has_the_scores_of_the_run_and_the_file_its_images(options, run, tmp_path):
    card = exported(run, tmp_path / "it.safetensors")
    psnr = report(run)["recipes"]["rtn-nvfp4-none"]["metrics"]["psnr"]
    assert f"| PSNR ↑ | {psnr['value']:.2f} dB | {psnr['low']:.2f} to {psnr['high']:.2f} |" in card
    assert "![Pairs: full precision and quantized](it.png)" in card
    assert (tmp_path / "it.png").is_file()
    assert all(prompt in card for prompt in PROMPTS)
    assert "Weights are exact" in card
    assert "| proj_out | 1 |" in card
    assert "the gate of 0.1" in card
    assert str(tmp_path) not in card
    stages.compare(resolve_all(options, f"file:{tmp_path / 'it.safetensors'}"), tmp_path / "compared", False)
    quantized = "images/quantized"
    assert images(tmp_path / "compared" / "recipes" / "it" / quantized) == images(run / quantized)


def test_a_folder_has_its_card_within_and_is_replaced_whole(run, tmp_path, monkeypatch):
    monkeypatch.undo()  # the formats that come with dmquant
    for _ in range(2):
        exporting.export(run, "modelopt", tmp_path / "it", True)
    card = (tmp_path / "it" / "README.md").read_text("utf-8")
    assert card.startswith("---")
    assert card.count(MARK) == 1
    assert "![Pairs: full precision and quantized](pairs.png)" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]
    assert {"README.md", "pairs.png"} <= listed(tmp_path / "it").keys()
    assert not any(".replaced" in path.name for path in (tmp_path / "it").iterdir())


def test_a_model_of_no_run_or_of_another_is_not_measured(options, run, tmp_path):
    stages.quantize(
        resolve(options.__class__(**vars(options) | {"recipe": "rtn", "w": "nvfp4", "a": "none"})),
        tmp_path / "m",
        False,
    )
    card = exported(tmp_path / "m", tmp_path / "it.safetensors")
    assert "**Nothing was measured**: the model is in no run folder" in card
    assert "dmquant compare MODEL --recipes file:it.safetensors --metrics psnr,lpips" in card
    assert not (tmp_path / "it.png").exists()


def test_a_card_of_somebody_else_stays(run, tmp_path):
    (tmp_path / "it.md").write_text("my notes")
    with pytest.raises(UserError, match=r"it\.md is there, and is no card of an export"):
        exported(run, tmp_path / "it.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["it.md"]


def test_a_file_goes_to_no_place_that_would_mislead_or_cost_the_model(run, tmp_path):
    weights = run / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UserError, match=r"lies in the model .*: choose another place with --out"):
        exported(run, weights, overwrite=True)
    assert weights.read_bytes() == before
    assert not weights.with_suffix(".md").exists()
    with pytest.raises(UsageError, match=r"names end in \.safetensors: have --out .* end so"):
        exported(run, tmp_path / "it.gguf")
    (tmp_path / "it.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder, and this format is a file"):
        exported(run, tmp_path / "it.safetensors", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["it.safetensors"]


def test_exports_whose_config_names_no_method_are_inspected(options, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the formats that come with dmquant
    recipe = tmp_path / "rows.yaml"
    recipe.write_text("name: rows\nengine: bfl\nweights: fp8\nactivations: none\ngranularity: channel\nstore: fp32\n")
    stages.quantize(resolve(options.__class__(**vars(options) | {"recipe": str(recipe)})), tmp_path / "m", False)
    exporting.export(tmp_path / "m", "bfl", tmp_path / "it", False)
    capsys.readouterr()
    listing.inspect(tmp_path / "it", False)
    assert "bfl layers in diffusers" in capsys.readouterr().out


def test_files_are_named_and_names_are_told_apart(options, run, tmp_path):
    with pytest.raises(UsageError, match="file: names no file: write file:PATH"):
        resolve_all(options, "file:")
    files = [tmp_path / folder / "it.safetensors" for folder in ("a", "b")]
    for file in files:
        exported(run, file)
    with pytest.raises(UsageError, match=r"two of the recipes are called 'it': give one another name$"):
        resolve_all(options, ",".join(f"file:{file}" for file in files))


def test_a_file_that_no_export_wrote_is_moved_aside_and_comes_back_where_the_export_fails(run, tmp_path, monkeypatch):
    out, aside = tmp_path / "it.safetensors", tmp_path / "it.safetensors.replaced"
    out.write_bytes(b"the user's")

    def refused(*args):
        raise UserError("no")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "writable", lambda name: replace(labelled.FORMAT, export=refused))
        with pytest.raises(UserError, match="no"):
            exported(run, out, overwrite=True)
    assert out.read_bytes() == b"the user's"
    assert not aside.exists()
    exported(run, out, overwrite=True)
    assert aside.read_bytes() == b"the user's"
    exported(run, out, overwrite=True)
    assert len(list(tmp_path.glob("*.safetensors*"))) == 2
