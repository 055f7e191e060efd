"""`dmquant tune` on a tiny pipeline: what it saves, says and refuses."""

import contextlib
from dataclasses import replace

import pytest
import torch
import yaml

from dmquant.errors import UsageError, UserError
from dmquant.host.console import Console
from dmquant.layers import QUANTIZED
from dmquant.pipelines.commands import stages
from dmquant.pipelines.models.loading import load_pipeline
from dmquant.pipelines.runs import tuning
from dmquant.pipelines.runs.settings import Options, resolve
from dmquant.pipelines.runs.tuning import Recovery
from tests.tiny import TINY, tiny_sd3

SMALL = {"steps": 4, "batch_size": 4, "rate": 1.0, "prompts": 3, "last": 2, "optimizer": "adamw"}


def settings_of(folder, **options):
    size = TINY["pixart-sigma"].size
    given = {"recipe": "rtn", "w": "int3", "a": "fp6", "steps": 3, "height": size, "width": size, "dtype": "fp32"}
    return resolve(Options(model=str(folder), device="cpu", command="dmquant tune", **given | options))


@pytest.fixture(scope="module")
def tuned(original, tmp_path_factory):
    """A tuned model, the facts about it, and the same model before."""
    out = tmp_path_factory.mktemp("tuned")
    settings = settings_of(original)
    stages.quantize(settings, out / "before", overwrite=False)
    recovery = Recovery.of("weights,scales,biases,norms,kept", begin=out / "before", **SMALL)
    stages.tune(settings, recovery, out / "after", overwrite=False)
    return out, settings


def test_it_is_a_pipeline_of_the_same_size_that_says_how_it_was_made(tuned, original):
    out, _ = tuned
    before, after = (load_pipeline(out / name).transformer for name in ("before", "after"))
    assert {name: tensor.shape for name, tensor in before.state_dict().items()} == {
        name: tensor.shape for name, tensor in after.state_dict().items()
    }
    layers = [layer for layer in after.modules() if isinstance(layer, tuple(QUANTIZED.values()))]
    assert layers
    assert before.config.quantization_config == after.config.quantization_config
    record = yaml.safe_load((out / "after" / "run.yaml").read_text())["tuning"]
    assert record["train"] == ["weights", "scales", "biases", "norms", "kept"]
    assert record["begin"] == "before"
    assert record["error"] <= record["error_before"]
    card = (out / "after" / "README.md").read_text()
    assert "weights, scales, biases, norms and kept learned from the full-precision model: 4" in card
    assert str(out) not in card


def test_what_is_saved_has_the_error_that_is_told(tuned, original):
    out, settings = tuned
    record = yaml.safe_load((out / "after" / "run.yaml").read_text())["tuning"]
    recovery = Recovery.of("biases", begin=out / "after", **SMALL | {"rate": 1e-9})
    again = tuning.tune(settings, recovery, out / "again", Console(), out / "room", "weights")
    assert again["error_before"] == pytest.approx(record["error"], abs=0.01)


def test_a_recovery_that_was_stopped_goes_on_to_the_same_bytes(tuned, original, monkeypatch):
    out, settings = tuned
    recovery = Recovery.of("weights,scales,biases,norms,kept", begin=out / "before", **SMALL)

    def stopped(*args, **options):
        @contextlib.contextmanager
        def bar(title):
            def told(done, total, *what, **more):
                if title == "tuning":
                    raise KeyboardInterrupt

            yield told

        monkeypatch.setattr(Console, "bar", lambda self, title: bar(title))
        stages.tune(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        stopped(settings, recovery, out / "resumed", overwrite=False)
    monkeypatch.undo()
    stages.tune(settings, recovery, out / "resumed", overwrite=False)
    files = ("transformer/diffusion_pytorch_model.safetensors", "transformer/config.json")
    assert all((out / "after" / file).read_bytes() == (out / "resumed" / file).read_bytes() for file in files)


def test_a_recipe_is_quantized_first_and_a_model_for_q_galore_takes_less(original, tmp_path, capsys):
    recovery = Recovery.of("weights", **SMALL | {"optimizer": "qgalore"})
    stages.tune(settings_of(original), recovery, tmp_path / "out", overwrite=False)
    assert "by Q-GaLore" in capsys.readouterr().out
    model = load_pipeline(tmp_path / "out")
    assert torch.isfinite(model.transformer.proj_out.weight).all()


def test_bad_input(tuned, original, tmp_path):
    _, settings = tuned
    for wrong, said in (
        ({"train": "wieghts"}, "did you mean"),
        ({"train": ","}, "--train is empty"),
        ({"train": "weights,lora"}, "name one of the two"),
        ({"train": "scales", "optimizer": "qgalore"}, "is for --train weights"),
        ({"train": "scales", "rate": float("nan")}, "is no number of rate"),
        ({"train": "scales", "last": 0}, "is no number of last"),
    ):
        with pytest.raises(UsageError, match=said):
            Recovery.of(**SMALL | wrong)
    with pytest.raises(UsageError, match="this model has nothing of that"):
        stages.tune(settings, Recovery.of("branch", **SMALL), tmp_path / "out", overwrite=False)
    little = settings_of(original, memory_budget="50kB")
    with pytest.raises(UsageError, match=r"takes .* more than the 50.0 kB there are"):
        stages.tune(little, Recovery.of("weights", **SMALL), tmp_path / "out", overwrite=False)
    with pytest.raises(UsageError, match=r"^--offload group: gradients .* use --offload model$"):
        stages.tune(replace(settings, offload="group"), Recovery.of("scales", **SMALL), tmp_path / "out", False)
    with pytest.raises(UsageError, match="there is no such folder"):
        stages.tune(
            settings, Recovery.of("scales", begin=tmp_path / "none", **SMALL), tmp_path / "out", overwrite=False
        )
    with pytest.raises(UserError, match="no pipeline that dmquant quantized"):
        stages.tune(settings, Recovery.of("scales", begin=original, **SMALL), tmp_path / "out", overwrite=False)
    tiny_sd3(tmp_path / "sd3")
    other = settings_of(tmp_path / "sd3", height=None, width=None)
    stages.quantize(other, tmp_path / "other", overwrite=False)
    begin = tmp_path / "other"
    with pytest.raises(UserError, match="another configuration"):
        stages.tune(settings, Recovery.of("scales", begin=begin, **SMALL), tmp_path / "out", overwrite=False)
