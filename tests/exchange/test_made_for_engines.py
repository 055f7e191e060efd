"""A model made for an engine goes to it without a refusal, and is read with the rounding of inputs that was scored."""

import pytest
import torch

from dmquant import Recipe, quantize_pipeline
from dmquant.exchange.formats import formats
from dmquant.exchange.keys import Target, original
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.pipelines.runs.defaults import ENGINES
from tests.tiny import TINY

QUICK = {"rounding": "nearest", "scale": "mse", "learning": {"batch_size": 1}}
QUICK["calibration"] = {"prompts": 2, "steps_per_prompt": 1}
BY_RECIPROCALS = "compressed-tensors"  # divided by what we multiply by, to the last bit
APART = ("nunchaku-lite", "gguf")  # one takes no layers as narrow as these, the other rounds no inputs


@pytest.mark.parametrize(
    ("engine", "model"),
    [*((name, "pixart-sigma") for name in ENGINES if name not in APART), ("comfyui", "sd15")],
)
def test_inputs_are_read_as_they_were_scored(engine, model, tmp_path):
    tiny, recipe = TINY[model], Recipe.load(f"for-{engine}").with_settings(**QUICK)
    call = {"height": tiny.size, "width": tiny.size, "num_inference_steps": 2, **tiny.call}
    quantize_pipeline(tiny.build(), recipe, calibration=list(tiny.prompts), out=tmp_path / "model", **call)
    source, target = open_source(tmp_path / "model"), formats()[engine]
    out = tmp_path / f"out{'' if target.folder else target.suffix}"
    written = target.export(source, out, lambda done, total: None)
    assert written.exact or engine == BY_RECIPROCALS
    read, weights = open_foreign(out), [f"{name}.weight" for name in source.layers]
    theirs = None if target.folder else original(type(source.backbone).__name__, source.config, weights)
    for weight in theirs or [Target(name, (name,)) for name in weights]:
        layer = read.layers[weight.name.removesuffix(".weight")]
        ours = source.layer(weight.sources[0].removesuffix(".weight"))
        assert layer.activations == ours.activations
        assert layer.activations.engine.name == engine
        if ours.is_static:
            scale, tolerance = ours.input_scale.view(torch.float32).item(), 2**-22 if engine == BY_RECIPROCALS else 0
            assert layer.input_scale().item() == pytest.approx(scale, rel=tolerance, abs=0)
