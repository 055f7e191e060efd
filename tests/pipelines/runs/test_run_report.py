"""The report that is built from what a run folder remembers."""

import pytest

from dmquant.pipelines.runs.run_report import build_report
from dmquant.pipelines.runs.runfolder import claim
from tests.evaluation.conftest import smooth_images, write_images


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


def test_a_pipeline_whose_call_takes_no_steps_and_no_guidance_has_a_report(tmp_path, settings):
    with claim(tmp_path / "run", "m") as folder:
        for side in ("fp", "quantized"):
            write_images(folder.images(side), smooth_images(2))
            folder.finish(f"images_{side}", "0", peak_memory_bytes=None, peak_memory_of=None, not_finite=0)
        counts = {"layers": 1, "parameters": 4, "quantized_weights": 4, "bits_per_quantized_weight": 4.0}
        sizes = {"bits_per_weight": 4.0, "size_bytes": 2, "full_precision_bytes": 8, "seconds": 1.0}
        folder.finish("model", "0", **counts, **sizes, sha256={}, formats={"fp4_e2m1": 1})
        folder.finish("scores", "0", metrics={}, reference={}, seconds=1.0)
        shown = build_report(folder, settings).settings
    assert shown["steps"] == shown["guidance"] == "not taken by the pipeline"
