"""bitsandbytes' layers as it quantizes them on a CPU, decoded here as its own dequantizer does where that is right."""

import json

import pytest
import torch
from safetensors.torch import save_file

bnb = pytest.importorskip("bitsandbytes", reason="installed apart from what the other tests need, see .ci/run")

from dmquant.pipelines.models.opening import open_foreign

NAME = "blocks.0.proj"


def layer_of_four(kind="nf4", columns=128, nested=False):
    weight = (torch.randn(64, columns, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16()
    layer = bnb.nn.Linear4bit(columns, 64, quant_type=kind, compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=nested)
    return weight, layer.to("cpu")


def saved(folder, layer, changes=()):
    state = {f"{NAME}.{name}": one.contiguous() for name, one in layer.state_dict().items()} | dict(changes)
    save_file(state | {"norm.weight": torch.ones(3)}, folder / "a.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    return folder


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_decoded_as_by_bitsandbytes(tmp_path, kind, nested):
    _, layer = layer_of_four(kind, nested=nested)
    opened = open_foreign(saved(tmp_path, layer))
    assert opened.format.name == "bitsandbytes"
    assert set(opened.rest) == {"norm.weight", f"{NAME}.bias"}
    read = opened.layers[NAME]
    assert (read.format, read.shape) == (kind, (64, 128))
    state = layer.weight.quant_state
    state.dtype = torch.float32  # what it would round the weights to
    expected = bnb.functional.dequantize_4bit(layer.weight.data, state)
    assert torch.allclose(read.weight(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [96, 160])
def test_blocks_go_on_across_the_ends_of_rows(tmp_path, columns):
    """bitsandbytes 0.50.2 itself decodes these wrongly on a CPU: findings/bitsandbytes-cpu-block-across-rows.sh."""
    weight, layer = layer_of_four(columns=columns)
    read = open_foreign(saved(tmp_path, layer)).layers[NAME].weight()
    assert (read - weight.float()).norm() < 0.1 * weight.float().norm()


def test_eight_bits_are_decoded_by_rows(tmp_path):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    layer = bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    opened = open_foreign(saved(tmp_path, layer.to("cpu")))
    read = opened.layers[NAME]
    assert read.format == "int8"
    assert (read.weight() - weight).abs().max() <= weight.abs().amax() / 127
    assert "LLM.int8" in opened.notes[0]
