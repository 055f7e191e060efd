"""torchao's own readers on what is written for it: tensors bit for bit, and images of plain diffusers without dmquant.

Where torchao is importable, diffusers imports it at every start and warns: `.ci/run` installs it apart.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

APART = "installed apart from what the other tests need, see .ci/run"
pytest.importorskip("torchao", reason=APART)

from diffusers import DiffusionPipeline
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from dmquant.activations import fake_quantize
from dmquant.diffusers.torchvision import _SCHEMAS
from dmquant.exchange.formats import writable
from dmquant.kernels import forced
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.recipe import Recipe
from tests.exchange.test_formats import BLOCKS, TAKEN
from tests.tiny import PIXART_CALL

SAMPLE = f"""
import sys, torch
library = torch.library.Library("torchvision", "FRAGMENT")  # as dmquant.diffusers.torchvision says
for schema in {_SCHEMAS!r}:
    library.define(schema)
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
assert not any(name.startswith("dmquant") for name in sys.modules)
assert type(pipe.transformer.transformer_blocks[0].attn1.to_q.weight.data).__name__ == "NVFP4Tensor"
image = pipe("a red apple", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt",
             height=32, width=32, **{PIXART_CALL!r}).images
save_file({{"image": image}}, out)
"""


@pytest.fixture
def written(saved, tmp_path):
    def write(name):
        source = open_source(saved(Recipe(name="tried", **BLOCKS[name]), width=64))
        writable("torchao").export(source, tmp_path / "out", lambda done, total: None)
        return source, open_foreign(tmp_path / "out")

    return write


@pytest.mark.parametrize("name", TAKEN["torchao"])
def test_its_tensors_decode_to_ours_and_are_told_as_it_tells_them(written, name):
    source, foreign = written(name)
    (file,) = foreign.found.files
    tensors, metadata = load_file(file), dict(foreign.found.metadata)
    names = [one for one in json.loads(metadata["tensor_names"]) if "." in one]
    rooted = {one: tensor for one, tensor in tensors.items() if "." in one}
    made, left = unflatten_tensor_state_dict(rooted, {**metadata, "tensor_names": json.dumps(names)})
    assert not left
    for module in source.layers:
        decoded = made[f"{module}.weight"].dequantize(torch.float32)
        assert torch.equal(decoded, source.layer(module).dequantize(torch.float32))
    again, told = flatten_tensor_state_dict({f"{one}.weight": made[f"{one}.weight"] for one in source.layers})
    assert again.keys() <= tensors.keys()
    for key, header in told.items():
        if key != "tensor_names":
            theirs, ours = json.loads(header), json.loads(metadata[key])
            assert sorted(theirs.pop("_tensor_data_names")) == sorted(ours.pop("_tensor_data_names"))
            assert theirs == ours


def test_images_of_plain_diffusers_are_ours(written, tmp_path):
    """NVFP4 weights, in float32: bit for bit."""
    source, _ = written("nvfp4")
    (tmp_path / "sample.py").write_text(SAMPLE)
    command = [sys.executable, "sample.py", "out", "image.safetensors"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300, capture_output=True)
    with forced("reference"):
        pipe = DiffusionPipeline.from_pretrained(source.folder)
        pipe.set_progress_bar_config(disable=True)
        size = {"height": 32, "width": 32}
        seed = torch.Generator().manual_seed(0)
        ours = pipe(
            "a red apple", num_inference_steps=3, generator=seed, output_type="pt", **size, **PIXART_CALL
        ).images
    assert torch.equal(load_file(tmp_path / "image.safetensors")["image"], ours)


@pytest.mark.parametrize("name", ["fp8 x fp8", "int8 x int8"])
def test_its_products_are_those_of_inputs_rounded_as_told(written, name):
    """What the reader multiplies, on a CPU, is what is emulated of it, to the rounding of bfloat16."""
    _, foreign = written(name)
    module = "transformer_blocks.0.ff.net.0.proj"
    (file,) = foreign.found.files
    part = {key: tensor for key, tensor in load_file(file).items() if key.startswith(f"{module}._weight")}
    one = {f"{module}.weight": foreign.found.metadata[f"{module}.weight"], "tensor_names": f'["{module}.weight"]'}
    made, _ = unflatten_tensor_state_dict(part, one)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0] = 0
    theirs = torch.nn.functional.linear(x, made[f"{module}.weight"])
    assert not theirs[0, 0].any()
    rounded = fake_quantize(x, foreign.layers[module].activations)
    ours = torch.nn.functional.linear(rounded.float(), foreign.layers[module].weight())
    assert (theirs - ours).norm() < 2.0**-8 * ours.norm()
