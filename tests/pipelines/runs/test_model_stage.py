"""What a run says of the model that it made: bits and bytes count the same tensors above and below the line."""

import pytest
from safetensors.torch import load_file

from dmquant.host.console import Console
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.runs.model_stage import is_as_written, make_model
from dmquant.pipelines.runs.settings import Options, resolve
from tests.tiny import tiny_sd3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model whose position embedding is no parameter but a buffer that is saved, and the facts about it."""
    folder = tmp_path_factory.mktemp("made")
    tiny_sd3(folder / "sd3")
    settings = resolve(Options(model=str(folder / "sd3"), recipe="rtn", w="fp4", dtype="fp32", device="cpu"))
    pipeline = load_full_precision(settings.model, settings.dtype, settings.device, lambda line: None)
    assert "pos_embed.pos_embed" in dict(pipeline.transformer.named_buffers())
    elements = sum(tensor.numel() for tensor in pipeline.transformer.state_dict().values())
    facts = make_model(pipeline, settings, folder / "model", Console(), folder / "calibration", "weights")
    return folder / "model", facts, elements


def test_bits_and_bytes_count_what_the_file_holds(made):
    folder, facts, elements = made
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert facts["bits_per_weight"] == pytest.approx(8 * sum(tensor.nbytes for tensor in stored.values()) / elements)
    assert facts["full_precision_bytes"] == 2 * elements
    assert facts["parameters"] < elements


def test_every_file_that_is_loaded_is_checked(made, tmp_path):
    folder, facts, _ = made
    hashes = facts["sha256"] | facts["parts_sha256"]
    assert is_as_written(folder, hashes)
    assert {name for name in facts["sha256"] if name.endswith(".safetensors")} == {
        "transformer/diffusion_pytorch_model.safetensors"
    }
    for name in ("text_encoder_3/model.safetensors", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert not is_as_written(folder, hashes)
        (folder / name).write_bytes(good)
    assert is_as_written(folder, hashes)
