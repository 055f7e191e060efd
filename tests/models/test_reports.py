"""What a report prints belongs to the settings that it prints: a run that stopped under new ones has none."""

import contextlib
import json
import shutil

import pytest

from dmquant.errors import UserError
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs import image_stage, model_stage, scores, sides
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import resolve, resolve_all

RECIPES = "rtn,w8a8"


@pytest.fixture(scope="module")
def finished(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    stages.run(resolve(quick()), out, False)
    return out


@pytest.fixture
def again(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def compared(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compared"
    stages.compare(resolve_all(quick(), RECIPES), out, False)
    return out


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def result(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("change", "module", "work", "absent"),
    [
        ({"seed": 500}, image_stage, "make_images", "images_fp, images_quantized, scores"),
        ({"w": "int8"}, model_stage, "make_model", "model, images_quantized, scores"),
        ({"w": "int8", "seed": 500}, image_stage, "make_images", "images_fp, model, images_quantized, scores"),
        ({"metrics": "psnr,ssim"}, scores, "make_scores", "scores"),
    ],
    ids=str,
)
def test_a_run_stopped_under_other_settings_has_no_report(quick, again, monkeypatch, change, module, work, absent):
    before = (again / "report.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(module, work, stop)
        with pytest.raises(KeyboardInterrupt):
            stages.run(resolve(quick(**change)), again, False)
    with pytest.raises(UserError, match=rf"is not finished \({absent} not done\)"):
        stages.report(again)
    assert (again / "report.md").read_text() == before


def test_the_settings_of_before_have_their_report_again(quick, again, monkeypatch):
    before = result(again)
    with monkeypatch.context() as patch:
        patch.setattr(model_stage, "make_model", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.run(resolve(quick(w="int8")), again, False)
    stages.run(resolve(quick()), again, False)
    stages.report(again)
    assert result(again)["recipes"]["rtn"]["metrics"] == before["recipes"]["rtn"]["metrics"]


def test_images_that_were_begun_anew_are_not_those_of_the_report_before(quick, again, monkeypatch):
    real = image_stage.generate

    def stop_after_a_batch(*args, on_batch, **kwargs):
        return real(*args, on_batch=lambda generated: (on_batch(generated), stop()), **kwargs)

    monkeypatch.setattr(image_stage, "generate", stop_after_a_batch)
    with pytest.raises(KeyboardInterrupt):
        stages.run(resolve(quick(seed=500, batch_size=1)), again, False)
    with pytest.raises(KeyboardInterrupt):  # back to the settings of before, whose first image is gone
        stages.run(resolve(quick()), again, False)
    with pytest.raises(UserError, match="images_fp"):
        stages.report(again)


def test_errors_of_layers_of_another_model_are_not_printed(quick, again, monkeypatch):
    def unknown(*args):
        raise UserError("the layers cannot be compared")

    assert result(again)["recipes"]["rtn"]["layers"]
    monkeypatch.setattr(sides, "layer_errors", unknown)
    stages.run(resolve(quick(w="int8")), again, False)
    assert result(again)["recipes"]["rtn"].get("layers", []) == []


def test_prompts_that_are_cut_are_counted_again_for_other_prompts(quick, again, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("\n".join(["a red cat", "the blue boat " * 9]))
    for count, expected in ((2, "1 of 2 prompts"), (1, "none")):
        stages.run(resolve(quick(prompts=str(long), num_prompts=count)), again, False)
        assert result(again)["settings"]["prompts cut"].startswith(expected)


def test_a_stop_right_after_the_last_image_loses_no_fact(quick, tmp_path, monkeypatch):
    from dmquant.evaluation import generate

    real, finish = generate._call, RunFolder.finish
    long = tmp_path / "long.txt"
    long.write_text("\n".join(["a red cat", "the blue boat " * 9]))

    def overflowing(pipeline, batch, call):
        images = real(pipeline, batch, call)
        images[0] = float("nan")
        return images

    def stopping_at(name):
        return lambda folder, stage, *given, **record: (
            stop() if stage == name else finish(folder, stage, *given, **record)
        )

    for name in ("images_fp", "images_quantized", None):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(generate, "_call", overflowing)
            patch.setattr(RunFolder, "finish", stopping_at(name))
            stages.run(resolve(quick(prompts=str(long))), tmp_path / "run", False)
    found = result(tmp_path / "run")
    recipe = found["recipes"]["rtn"]
    assert found["settings"]["prompts cut"].startswith("1 of 2 prompts")
    assert recipe["settings"]["images with NaN or infinity"] == 1
    assert min(found["reference"]["seconds"]["generate"], recipe["seconds"]["generate"]) > 0
    assert min(found["reference"]["peak_memory_bytes"], recipe["peak_memory_bytes"]) > 0
    assert "layers" in recipe["settings"]["kernels"]


@pytest.mark.parametrize("change", ["psnr", "line"])
def test_scores_and_settings_that_were_changed_are_not_reported(quick, again, change):
    if change == "psnr":
        table = (again / "scores.csv").read_text()
        value = table.splitlines()[1].rpartition(",")[2]
        (again / "scores.csv").write_text(table.replace(value, "99.0"))
        with pytest.raises(UserError, match="scores not done"):
            stages.report(again)
    else:
        settings = (again / "run.yaml").read_text()
        (again / "run.yaml").write_text(settings.replace("seed: 0", "seed: 7"))
        with pytest.raises(UserError, match=r"run.yaml was changed since the run wrote it"):
            stages.report(again)
    before = result(again)
    stages.run(resolve(quick()), again, False)
    assert result(again)["recipes"]["rtn"]["metrics"] == before["recipes"]["rtn"]["metrics"]
    stages.report(again)


@pytest.mark.parametrize("change", [{"seed": 500}, {"steps": 2}], ids=str)
def test_a_comparison_stopped_under_other_settings_has_no_report(quick, compared, tmp_path, monkeypatch, change):
    again = shutil.copytree(compared, tmp_path / "run")
    monkeypatch.setattr(image_stage, "make_images", stop)
    with pytest.raises(KeyboardInterrupt):
        stages.compare(resolve_all(quick(**change), RECIPES), again, False)
    with pytest.raises(UserError, match="is not finished"):
        stages.report(again)


def test_a_recipe_of_a_comparison_that_was_made_anew_elsewhere_is_not_reported(quick, compared, tmp_path):
    again = shutil.copytree(compared, tmp_path / "run")
    stages.report(again)
    folder = RunFolder(again / "recipes" / "rtn")
    folder.finish(
        "model", "another", **{name: value for name, value in folder.record("model").items() if name != "fingerprint"}
    )
    with pytest.raises(UserError, match=r"is not finished \(model of rtn not done\)"):
        stages.report(again)


def test_a_run_of_an_earlier_version_can_be_reported(again):
    settings = (again / "run.yaml").read_text()
    (again / "run.yaml").write_text(settings[: settings.index("fingerprints:")])
    state = json.loads((again / "state.json").read_text())
    del state["sha256"], state["notes"]["run.yaml"]
    (again / "state.json").write_text(json.dumps(state))
    before = result(again)
    stages.report(again)
    assert result(again) == before
