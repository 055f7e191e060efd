"""Files that others quantized, measured like recipes: prompts and noise are the same; what does not fit is refused."""

import json
import shutil

import pytest
from PIL import Image

from dmquant.errors import UsageError, UserError
from dmquant.exchange import formats as known
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs import settings as run_settings
from dmquant.pipelines.runs import sides
from dmquant.pipelines.runs.settings import Options, resolve, resolve_all
from tests.exchange import labelled
from tests.exchange.test_dialects import DIALECTS
from tests.tiny import tiny_pixart

PROMPTS = ["red apple, food", "blue cat"]


@pytest.fixture(scope="module", autouse=True)
def _known_format():
    """The format of tests/exchange/labelled.py, beside those that come with dmquant."""
    patch = pytest.MonkeyPatch()
    listed = known.formats() | {"labelled": labelled.FORMAT}
    patch.setattr("dmquant.pipelines.models.opening.formats", lambda: listed)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    pipeline = tiny_pixart(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = Options(
        model=str(folder / "tiny"),
        prompts=str(folder / "prompts.txt"),
        steps=2,
        dtype="fp32",
        metrics="psnr",
    )
    return folder, pipeline.transformer, options


LAYERS = [f"transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn1.to_k", "ff.net.0.proj", "ff.net.2")]


def images(folder):
    return [Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))]


def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def compared(given, tmp_path_factory):
    folder, backbone, options = given
    out = tmp_path_factory.mktemp("runs") / "compared"
    (own,) = resolve_all(options, "w4a6").values()
    stages.quantize(own, folder / "quantized", False)
    path = labelled.write(folder / "other.safetensors", backbone, LAYERS, activations="fp6")
    plain = labelled.write(folder / "unrounded.safetensors", backbone, LAYERS)
    files = ",".join(f"file:{each}" for each in (path, plain, folder / "quantized"))
    stages.compare(resolve_all(options, f"w4a6,{files}"), out, False)
    return out


def test_what_dmquant_saved_gives_as_a_file_what_it_gives_as_a_recipe(compared):
    """The whole way of a file, but for what its reader does, leaves images and weights' errors as they are."""
    recipe, file = (compared / "recipes" / name for name in ("w4a6", "quantized"))
    assert images(file / "images" / "quantized") == images(recipe / "images" / "quantized")
    content = report(compared)["recipes"]
    same = ("metrics", "bits_per_weight", "weights")
    assert {name: content["quantized"][name] for name in same} == {name: content["w4a6"][name] for name in same}
    outputs = ([layer["output_error"] for layer in content[name]["layers"]] for name in ("quantized", "w4a6"))
    assert next(outputs) == next(outputs)


def test_the_report_says_what_a_file_is(compared):
    content = report(compared)["recipes"]["other"]
    assert (content["weights"], content["activations"]) == ("nvfp4", "fp6_e2m3 a token")
    assert content["settings"]["written as"] == (
        "labelled NVFP4, for tests; nibbles low first, block scales linear, scales multiplied"
    )
    assert [layer["name"] for layer in content["layers"]] == LAYERS
    assert all(0.001 < layer["weight_error"] < 0.02 and layer["bits"] < 4.6 for layer in content["layers"])
    assert not (compared / "recipes" / "other" / "model").exists()
    assert "other.safetensors, quantized by others" in (compared / "report.html").read_text("utf-8")


def test_inputs_are_rounded_as_the_engine_does(compared):
    scores = {name: one["metrics"]["psnr"]["value"] for name, one in report(compared)["recipes"].items()}
    assert scores["other"] < scores["unrounded"] < float("inf")


def test_it_resumes_and_another_file_of_the_name_is_measured_anew(given, compared, tmp_path, monkeypatch):
    folder, backbone, options = given
    path = shutil.copy(folder / "other.safetensors", tmp_path / "other.safetensors")
    again = shutil.copytree(compared, tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(sides, "load_source", lambda *args: pytest.fail("a pipeline was loaded for what was done"))
        stages.compare(resolve_all(options, f"file:{path}"), again, False)
    before = images(again / "recipes" / "other" / "images" / "quantized")
    assert before == images(compared / "recipes" / "other" / "images" / "quantized")
    labelled.write(path, backbone, LAYERS[:1])
    stages.compare(resolve_all(options, f"file:{path}"), again, False)
    assert images(again / "recipes" / "other" / "images" / "quantized") != before


def test_a_file_alone_is_a_run(given, compared, tmp_path):
    folder, _, options = given
    (settings,) = resolve_all(options, f"file:{folder / 'other.safetensors'}").values()
    stages.run(settings, tmp_path / "run", False)
    assert images(tmp_path / "run" / "images" / "quantized") == images(
        compared / "recipes" / "other" / "images" / "quantized"
    )
    stages.report(tmp_path / "run")


def test_images_are_made_with_a_file_as_the_backbone(given, compared, tmp_path):
    folder, _, options = given
    settings = resolve(run_settings.replace(options, recipe=f"file:{folder / 'other.safetensors'}", metrics=None))
    stages.generate(settings, tmp_path / "images", False)
    assert images(tmp_path / "images") == images(compared / "recipes" / "other" / "images" / "quantized")


def test_a_wrong_dialect_fails_alone_and_in_one_line(given, tmp_path, capsys):
    _, backbone, options = given
    path = labelled.write(tmp_path / "turned.safetensors", backbone, LAYERS, way=DIALECTS[4])
    with pytest.raises(UserError, match="1 of 2 recipes failed"):
        stages.compare(resolve_all(options, f"rtn,file:{path}"), tmp_path / "out", False)
    assert "turned.safetensors is mislabelled" in " ".join(capsys.readouterr().out.split())
    assert list(report(tmp_path / "out")["recipes"]) == ["rtn"]


def test_a_file_has_its_own_formats_and_quantizes_nothing(given, tmp_path):
    _, backbone, options = given
    path = labelled.write(tmp_path / "file.safetensors", backbone, LAYERS)
    settings = resolve(run_settings.replace(options, recipe=f"file:{path}"))
    with pytest.raises(UsageError, match="no recipe to quantize with"):
        stages.quantize(settings, tmp_path / "out", False)
    with pytest.raises(UsageError, match="brings its own formats"):
        resolve(run_settings.replace(options, recipe=f"file:{path}", w="int4"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="is truncated or damaged"):
        resolve_all(options, f"file:{path}")
    with pytest.raises(UserError, match="missing"):
        resolve_all(options, f"file:{tmp_path / 'none.safetensors'}")


def test_files_of_no_known_format_are_told(given, tmp_path):
    _, backbone, options = given
    path = labelled.write(tmp_path / "file.safetensors", backbone, LAYERS, label="nothing")
    with pytest.raises(UserError, match="is in no format that is known here"):
        resolve_all(options, f"file:{path}")
