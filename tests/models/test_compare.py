"""Several recipes against one set of full-precision images: made once, resumed, and one failure loses nothing else."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs import model_stage, sides
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Options, resolve_all
from tests.tiny import tiny_pixart

PROMPTS = ["red apple, food", "blue cat"]
RECIPES = "rtn,rtn:int8:none"
NAMES = ["rtn", "rtn-int8-none"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    tiny_pixart(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return Options(
        model=str(folder / "tiny"),
        prompts=str(folder / "prompts.txt"),
        steps=2,
        dtype="fp32",
        metrics="psnr,latent_mse",
    )


def compare(options, recipes, out, overwrite=False):
    stages.compare(resolve_all(options, recipes), out, overwrite)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compared"
    compare(options, RECIPES, out)
    return out


@pytest.fixture
def again(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def times(folder, pattern):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.glob(pattern)}


def work_done(folder):
    """When every image and every file of a model was written, but for its card, which the report brings, and sums."""
    return (
        times(folder, "images/fp/*.png")
        | times(folder, "recipes/*/images/*/*.png")
        | times(folder, "recipes/*/model/model_index.json")
        | times(folder, "recipes/*/model/*/*")
    )


def report(folder):
    return json.loads((folder / "report.json").read_text())


def refuse(*args, **kwargs):
    raise AssertionError("a pipeline was loaded for something that was done")


def test_it_leaves_one_set_of_full_precision_images_and_a_folder_a_recipe(finished):
    entries = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    files = {"run.yaml", "state.json", "report.json", "report.md", "report.html", "grid.png", "compare.png", "log.txt"}
    assert entries == files | {"images", "recipes", "probe"}
    assert len(list(finished.glob("images/fp/*.png"))) == len(PROMPTS)
    assert sorted(path.name for path in (finished / "recipes").iterdir()) == NAMES
    for name in NAMES:
        assert len(list((finished / "recipes" / name / "images" / "quantized").glob("*.png"))) == len(PROMPTS)
        assert (finished / "recipes" / name / "model" / "model_index.json").is_file()


def test_the_report_holds_every_recipe_and_where_its_images_are(finished):
    recipes = report(finished)["recipes"]
    assert list(recipes) == NAMES
    assert [recipe["weights"] for recipe in recipes.values()] == ["nl4", "int8"]
    assert [recipe["activations"] for recipe in recipes.values()] == ["fp6_e2m3", "none"]
    fine, coarse = recipes["rtn-int8-none"], recipes["rtn"]
    assert fine["bits_per_weight"] > coarse["bits_per_weight"] + 1
    assert fine["metrics"]["psnr"]["value"] > coarse["metrics"]["psnr"]["value"] + 6
    assert fine["metrics"]["latent_mse"]["value"] < coarse["metrics"]["latent_mse"]["value"] / 4
    for recipe in recipes.values():
        assert len(list((finished / recipe["images"]).glob("*.png"))) == len(PROMPTS)
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert 'href="recipes/rtn-int8-none/images/quantized/00001.png"' in page


def test_a_recipe_gives_in_a_comparison_what_it_gives_alone(options, finished, tmp_path):
    (settings,) = resolve_all(options, "rtn").values()
    stages.run(settings, tmp_path / "alone", False)
    for index in range(len(PROMPTS)):
        image = f"images/quantized/{index:05d}.png"
        assert (tmp_path / "alone" / image).read_bytes() == (finished / "recipes" / "rtn" / image).read_bytes()
    alone, beside = (report(folder)["recipes"]["rtn"] for folder in (tmp_path / "alone", finished))
    assert alone["metrics"] == beside["metrics"]


def test_the_same_command_again_does_nothing_again(options, again, monkeypatch):
    before, content = work_done(again), report(again)
    monkeypatch.setattr(sides, "load_source", refuse)
    monkeypatch.setattr(sides, "load_quantized", refuse)
    compare(options, RECIPES, again)
    assert work_done(again) == before
    assert report(again) == content


def test_another_recipe_later_is_the_only_one_done(options, again):
    before = work_done(again)
    compare(options, f"{RECIPES},w8a8", again)
    after = work_done(again)
    assert before.items() <= after.items()
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"w8a8"}
    assert list(report(again)["recipes"]) == [*NAMES, "w8a8"]


def test_what_a_stopped_comparison_finished_is_kept(options, tmp_path, monkeypatch):
    out, made = tmp_path / "run", []

    def stop_at_the_second(*args, **kwargs):
        if made:
            raise KeyboardInterrupt
        made.append(real(*args, **kwargs))
        return made[-1]

    real = model_stage.make_model
    with monkeypatch.context() as patch:
        patch.setattr(model_stage, "make_model", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            compare(options, RECIPES, out)
    assert not (out / "report.json").exists()
    with pytest.raises(UserError, match=r"not finished \(recipes not done\)"):
        stages.report(out)
    before = work_done(out)
    assert len(before) > 2 * len(PROMPTS)
    compare(options, RECIPES, out)
    assert before.items() <= work_done(out).items()
    assert list(report(out)["recipes"]) == NAMES


def test_a_failing_recipe_is_one_line_and_the_others_are_there(options, tmp_path, monkeypatch, capsys):
    real = model_stage.make_model

    def failing(pipeline, settings, *args, **kwargs):
        if settings.recipe.name == "rtn":
            with torch.no_grad():
                pipeline.transformer.proj_out.weight.zero_()  # half-changed when it fails
            raise UserError("block 3 holds NaN")
        return real(pipeline, settings, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model_stage, "make_model", failing)
        with pytest.raises(UserError, match=r"1 of 2 recipes failed \(rtn\)") as raised:
            compare(options, RECIPES, tmp_path / "run")
    assert raised.value.exit_code == 1
    assert "recipe rtn failed: block 3 holds NaN\n" in capsys.readouterr().out
    assert list(report(tmp_path / "run")["recipes"]) == ["rtn-int8-none"]
    assert report(tmp_path / "run")["recipes"]["rtn-int8-none"]["metrics"]["psnr"]["value"] > 30
    compare(options, RECIPES, tmp_path / "run")
    assert list(report(tmp_path / "run")["recipes"]) == NAMES


def test_a_recipe_whose_images_cannot_be_scored_is_one_line_too(options, again, capsys):
    state = again / "recipes" / "rtn" / "state.json"
    content = json.loads(state.read_text())
    del content["stages"]["scores"]
    state.write_text(json.dumps(content))
    Image.new("RGB", (8, 8)).save(again / "recipes" / "rtn" / "images" / "quantized" / "00002.png")
    with pytest.raises(UserError, match=r"1 of 2 recipes failed \(rtn\)"):
        compare(options, RECIPES, again)
    assert "recipe rtn failed: " in capsys.readouterr().out
    assert list(report(again)["recipes"]) == ["rtn-int8-none"]


def test_when_all_recipes_fail_no_report_of_an_earlier_comparison_passes_for_theirs(options, again, monkeypatch):
    def failing(*args, **kwargs):
        raise UserError("no memory")

    monkeypatch.setattr(model_stage, "make_model", failing)
    with pytest.raises(UserError, match="2 of 2 recipes failed"):
        compare(replace(options, w="fp6"), "rtn,w8a8", again)
    with pytest.raises(UserError, match="not finished"):
        stages.report(again)


def test_its_reports_can_be_written_again(again):
    before = report(again)
    (again / "report.json").unlink()
    stages.report(again)
    assert report(again) == before


def test_w_and_a_are_for_the_entries_that_give_no_formats_of_their_own(options, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine/odd name\nweights: fp8\n")
    settings = resolve_all(replace(options, w="int4", a="int8"), f"rtn, rtn:fp4 ,{mine},rtn,w4a16::fp6")
    assert {name: given.formats for name, given in settings.items()} == {
        "rtn": ("int4", "int8"),
        "rtn-fp4": ("fp4_e2m1", "int8"),
        "mine/odd name": ("int4", "int8"),
        "w4a16-fp6": ("int4", "fp6_e2m3"),
    }
    assert len({given.model_key("weights") for given in settings.values()}) == len(settings)


def test_a_recipes_folder_has_a_name_that_any_file_system_takes(finished):
    assert re.fullmatch(r"mine_odd_name-[0-9a-f]{12}", RunFolder(finished).recipe("mine/odd name: ü").name)


def test_the_pictures_are_whole(finished):
    for name in ("grid.png", "compare.png"):
        with Image.open(finished / name) as picture:
            picture.load()
            assert picture.width > 400
