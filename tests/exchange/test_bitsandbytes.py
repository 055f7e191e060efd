"""Layers in bitsandbytes' layout, made by hand: what they decode to, what is damaged, and a pipeline to start from."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmquant.errors import UserError
from dmquant.pipelines.models.loading import checked_folder, load_full_precision
from dmquant.pipelines.models.opening import open_foreign
from dmquant.pipelines.models.registry import as_source, resolve_model
from tests.tiny import tiny_pixart

NAME, BLOCK = "blocks.0.proj", 64
TABLE = torch.linspace(-1, 1, 16)


def four_bits(name, weight, nested=False):
    """Tensors of a float weight on TABLE, in blocks of its flattened elements; and the weight that they stand for."""
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    parts = {"quant_map": TABLE, "absmax": scale}
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
    if nested:
        fine, coarse = torch.arange(256) / 255, (scale - scale.mean()).abs().view(1, -1).amax(1)
        codes = ((scale - scale.mean()) / coarse).clamp(0, 1).mul(255).round().to(torch.uint8)
        parts |= {"absmax": codes, "nested_absmax": coarse, "nested_quant_map": fine}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": scale.mean().item()}
        scale = fine[codes.int()] * coarse + scale.mean()
    codes = (blocks / blocks.abs().amax(1, keepdim=True)).sub(TABLE.view(16, 1, 1)).abs().argmin(0).to(torch.uint8)
    stands_for = (TABLE[codes.int()] * scale[:, None]).flatten()[: weight.numel()].view(weight.shape)
    flat = codes.flatten()[: weight.numel() + weight.numel() % 2].view(-1, 2)
    tensors = {f"{name}.weight": (flat[:, 0] << 4 | flat[:, 1]).view(-1, 1)}
    tensors |= {f"{name}.weight.{part}": one.clone() for part, one in parts.items()}
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{name}.weight.quant_state.bitsandbytes__nf4": told}, stands_for


def saved(folder, tensors):
    save_file(tensors | {"norm.weight": torch.ones(3), f"{NAME}.bias": torch.ones(24)}, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("columns", [64, 96, 100])
def test_blocks_go_on_across_the_ends_of_rows(tmp_path, columns, nested):
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
    tensors, stands_for = four_bits(NAME, weight, nested)
    opened = open_foreign(saved(tmp_path, tensors))
    read = opened.layers[NAME]
    assert (opened.format.name, read.format, read.shape) == ("bitsandbytes", "nf4", (24, columns))
    assert set(opened.rest) == {"norm.weight", f"{NAME}.bias"}
    assert torch.allclose(read.weight(), stands_for, atol=1e-6)
    assert nested or (read.weight() - weight).norm() < 0.15 * weight.norm()
    stored = math.ceil(24 * columns / 2) + len(tensors[f"{NAME}.weight.absmax"]) * (1 if nested else 4)
    assert read.nbytes > stored


def test_rows_of_eight_bits(tmp_path):
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(1)
    codes = (weight / scale[:, None] * 127).round().to(torch.int8)
    opened = open_foreign(saved(tmp_path, {f"{NAME}.weight": codes, f"{NAME}.SCB": scale}))
    assert torch.allclose(opened.layers[NAME].weight(), codes * scale[:, None] / 127)
    assert "LLM.int8" in opened.notes[0]


@pytest.mark.parametrize(
    ("part", "replaced", "fault"),
    [
        ("quant_state.bitsandbytes__nf4", torch.tensor([1, 2], dtype=torch.uint8), "holds no state of a layer"),
        ("quant_state.bitsandbytes__nf4", torch.tensor([123, 125], dtype=torch.uint8), "holds no state of a layer"),
        ("absmax", torch.ones(7), r"absmax has 7 elements, and a weight of \[24, 64\] in blocks of 64 has 24"),
        ("quant_map", None, r"lacks blocks\.0\.proj\.weight\.quant_map"),
    ],
)
def test_damaged_layers_are_a_line(tmp_path, part, replaced, fault):
    tensors, _ = four_bits(NAME, torch.randn(24, 64, generator=torch.Generator().manual_seed(0)))
    if replaced is None:
        del tensors[f"{NAME}.weight.{part}"]
    else:
        tensors[f"{NAME}.weight.{part}"] = replaced
    with pytest.raises(UserError, match=fault):
        open_foreign(saved(tmp_path, tensors))


def test_a_pipeline_is_the_source_of_a_run_when_asked_for(tmp_path):
    tiny_pixart(tmp_path / "model")
    [file] = (tmp_path / "model" / "transformer").glob("*.safetensors")
    state, expected = load_file(file), {}
    for name in [name for name in state if name.startswith("transformer_blocks") and state[name].ndim == 2]:
        if name.endswith(".weight"):
            tensors, expected[name] = four_bits(name.removesuffix(".weight"), state.pop(name), nested=True)
            state |= tensors
    save_file(state, file)
    config = tmp_path / "model" / "transformer" / "config.json"
    content = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(content))
    spec = resolve_model(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"already quantized \(by bitsandbytes\).*--source-quantized"):
        checked_folder(spec, print)
    loaded = load_full_precision(as_source(spec, (), "dequantize"), torch.float32, "cpu", print).transformer
    weights = loaded.state_dict()
    assert len(expected) == 10
    assert all(torch.allclose(weights[name], one, atol=1e-6) for name, one in expected.items())
