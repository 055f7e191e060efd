"""The report that is built from what a run folder remembers."""

import pytest

from dmquant.errors import UserError
from dmquant.pipelines.runs.run_report import build_report
from dmquant.pipelines.runs.runfolder import RunFolder, claim
from tests.evaluation.conftest import smooth_images, write_images

LAYER = {"name": "proj", "kind": "Linear", "format": "fp4_e2m1", "bits": 4.0, "weight_error": 0.1, "output_error": None}


@pytest.fixture
def settings():
    """What run.yaml holds of a pipeline whose call has no steps and no guidance."""
    recipe = {
        "name": "rtn",
        "weights": "fp4",
        "activations": "none",
        "rounding": {"method": "nearest"},
        "granularity": "channel",
        "activation_granularity": "token",
        "scale": "absmax",
        "store": "fp32",
    }
    return {
        "model": {"name": "m", "source": "/models/m", "pipeline": "DanceDiffusionPipeline"},
        "recipe": recipe,
        "images": {"seed": 0, "count": 2, "batch_size": 1, "height": 32, "width": 32},
        "metrics": ["psnr"],
        "real": None,
        "device": "cpu",
        "dtype": "fp32",
        "versions": {},
        "prompt_set": "p",
        "prompts_sha256": "0",
        "prompts": ["a", "b"],
    }


def finished(path, **changed):
    """A run folder in which everything is recorded; `changed` replaces records by stage."""
    records = {
        "images_fp": dict.fromkeys(("peak_memory_bytes", "peak_memory_of"), None) | {"not_finite": 0},
        "images_quantized": dict.fromkeys(("peak_memory_bytes", "peak_memory_of"), None) | {"not_finite": 0},
        "model": {
            **dict.fromkeys(("layers", "parameters", "quantized_weights", "size_bytes", "full_precision_bytes"), 4),
            **dict.fromkeys(("bits_per_quantized_weight", "bits_per_weight", "seconds"), 4.0),
            "sha256": {},
            "formats": {"fp4_e2m1": 1},
        },
        "scores": {"metrics": {}, "reference": {}, "seconds": 1.0},
    }
    with claim(path, "m") as folder:
        for side in ("fp", "quantized"):
            write_images(folder.images(side), smooth_images(2))
        for stage, record in (records | changed).items():
            folder.finish(stage, "0", **record)
        return folder


def test_a_pipeline_whose_call_takes_no_steps_and_no_guidance_has_a_report(tmp_path, settings):
    shown = build_report(finished(tmp_path / "run"), settings).settings
    assert shown["steps"] == shown["guidance"] == "not taken by the pipeline"


def test_guidance_is_the_argument_that_the_family_has_for_it(tmp_path, settings):
    settings["model"]["family"] = "qwenimage"
    settings["images"] |= {"guidance_scale": 1.0, "true_cfg_scale": 4.0}
    assert build_report(finished(tmp_path / "run"), settings).settings["guidance"] == 4.0


def test_what_is_not_known_of_images_is_no_zero(tmp_path, settings):
    forgotten = {"images": 2, "peak_memory_bytes": None, "peak_memory_of": None, "not_finite": None}
    folder = finished(tmp_path / "run", images_quantized=forgotten, images_fp=forgotten)
    with claim(tmp_path / "run", "m") as claimed:
        claimed.note("seconds_fp", {"a": 1.5})
        claimed.note("seconds_quantized", {"a": 1.5, "b": 2.0})
    report = build_report(RunFolder(folder.path), settings)
    assert report.reference.seconds == {}
    assert report.recipes["rtn"].seconds == {"quantize": 4.0, "generate": 3.5, "score": 1.0}
    assert report.recipes["rtn"].settings["images with NaN or infinity"] == "not recorded"


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": {"layers": [["a list"]]}},
        {"layers": {"layers": [{**LAYER, "weight_error": "0.1"}]}},
        {"scores": {"metrics": {"psnr": {"value": float("inf")}}, "reference": {}, "seconds": 1.0}},
        {"scores": {"metrics": {}, "reference": {}, "seconds": [1.0]}},
        {"images_fp": {}},
        {"model": {"layers": 1}},
    ],
)
def test_a_record_that_no_run_writes_is_one_line_that_names_the_run(tmp_path, settings, changed):
    folder = finished(tmp_path / "run", **changed)
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} are damaged .*--overwrite") as caught:
        build_report(folder, settings)
    assert len(str(caught.value).splitlines()) == 1


def test_times_are_compared_where_one_process_made_images_of_both_sides(settings, tmp_path):
    folder = finished(tmp_path / "run")

    def timed(seconds_fp, seconds_quantized, sessions_fp, sessions_quantized):
        for kind, facts in {key: value for key, value in locals().items() if key != "folder"}.items():
            folder.note(kind, dict(enumerate(facts)))
        return build_report(folder, settings).recipes["rtn"].relative_time

    assert timed([2.0] * 3, [9.0, 1.5, 1.5], ["a"] * 3, ["a"] * 3) == 0.75, "the first one compiles"
    assert timed([2.0, 2.0], [1.5, 1.5], ["a", "a"], ["b", "b"]) is None
    assert timed([2.0, 8.0], [1.0, 1.0, 30.0], ["a", "b"], ["a", "a", "b"]) == 0.5
    assert timed([], [], [], []) is None
