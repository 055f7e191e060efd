"""diffusers' own from_pretrained and from_single_file, where our quantizer is called: whole models or one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmquant.convert import quantize_
from dmquant.diffusers.bounds import bounded, check_sizes
from dmquant.diffusers.quantizer import DMQuantizer, QuantConfig
from dmquant.errors import UsageError, UserError
from dmquant.host import checksums
from tests.tiny import tiny_pixart, tiny_sd

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized transformer of two blocks, and the full-precision one beside it; not to be changed."""
    folder, model = tmp_path_factory.mktemp("saved"), tiny_pixart(blocks=2).transformer
    model.save_pretrained(folder / "plain")
    quantize_(model, "w4a6")
    model.save_pretrained(folder / "packed")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder, type(model)


@pytest.fixture
def copy(saved, tmp_path):
    folder, kind = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, kind


def edit_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(load, match):
    with pytest.raises(UserError, match=match) as caught:
        load()
    assert "\n" not in str(caught.value)


CHANGES = {
    "missing": (lambda tensors: tensors.pop(max(tensors)), r"lacks 1 tensor\(s\) of its model|holds no packed weight"),
    "more": (lambda tensors: tensors.update({"more.bias": torch.ones(2)}), "that its config.json has no place for"),
    "shape": (lambda tensors: tensors.update({max(tensors): torch.ones(3, 5)}), r"in shape \[3, 5\], which"),
    "kind": (
        lambda tensors: tensors.update({n: t.view(torch.int8) for n, t in tensors.items() if t.dtype == torch.uint8}),
        "in int8, which is saved in uint8",
    ),
}


@pytest.mark.parametrize("which", ["packed", "sharded"])
@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES.keys())
def test_tensors_that_are_not_the_models(which, change, match, copy):
    folder, kind = copy
    files = sorted((folder / which).glob("*.safetensors"))
    edit_tensors(next(file for file in files if any(name.endswith(".qweight") for name in load_file(file))), change)
    refused(lambda: kind.from_pretrained(folder / which), match)


def test_fewer_layers_in_the_config_than_in_the_file(copy):
    folder, kind = copy
    edit_config(folder / "packed", num_layers=1)
    refused(lambda: kind.from_pretrained(folder / "packed"), "packed weights .* that its config.json does not describe")
    edit_config(folder / "plain", num_layers=1)
    config = QuantConfig("w4a6")
    refused(
        lambda: kind.from_pretrained(folder / "plain", quantization_config=config),
        r"/plain holds \d+ tensor\(s\) that its config.json has no place for, 'transformer_blocks\.1",
    )


def test_size_and_header_are_compared_with_the_checksums_of_the_pipeline(copy):
    folder, kind = copy
    checksums.write(folder)
    kind.from_pretrained(folder / "packed")
    file = folder / "packed" / FILE
    edit_tensors(file, lambda tensors: tensors.update(more=torch.ones(1)))
    refused(lambda: kind.from_pretrained(folder / "packed"), rf"{FILE} is not what was saved: \d+ bytes, not \d+")
    checksums.rewritten(folder, [f"packed/{FILE}"])
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    refused(lambda: kind.from_pretrained(folder / "packed"), f"{FILE} is not what was saved: the names, dtypes and")


class TestSingleFile:
    """A checkpoint of one file in full precision is quantized while it loads, as a folder is."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        unet = tiny_sd().unet
        unet.save_pretrained(tmp_path / "unet")
        shutil.copy(tmp_path / "unet" / FILE, tmp_path / "single.safetensors")
        return tmp_path, type(unet)

    def load(self, checkpoint, recipe="w4a6"):
        folder, kind = checkpoint
        config = str(folder / "unet")
        return kind.from_single_file(
            str(folder / "single.safetensors"), config=config, quantization_config=QuantConfig(recipe)
        )

    def test_it_is_the_model_that_its_folder_gives(self, checkpoint):
        folder, kind = checkpoint
        expected = kind.from_pretrained(folder / "unet", quantization_config=QuantConfig("w4a6")).state_dict()
        loaded = self.load(checkpoint)
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        loaded.save_pretrained(folder / "again")
        again = kind.from_pretrained(folder / "again").state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in again.items())

    def test_a_recipe_that_needs_data_is_refused(self, checkpoint):
        with pytest.raises(UsageError, match="recipe 'gptq' needs calibration data"):
            self.load(checkpoint, "gptq")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda tensors: tensors.pop("conv_in.bias"), "lacks 1 tensor.*conv_in.bias"),
            (lambda tensors: tensors.update({"conv_in.qweight": torch.ones(4)}), "packed weights .'conv_in.qweight'"),
            (lambda tensors: tensors.update({"down_blocks.0.resnets.7.conv1.bias": torch.ones(4)}), "has no place for"),
        ],
    )
    def test_tensors_converted_from_another_layout_are_the_models(self, change, match):
        """What diffusers makes of a checkpoint with the names of another library, which may leave things of its own."""
        unet = tiny_sd().unet
        tensors = unet.state_dict() | {"logit_scale": torch.ones(())}
        DMQuantizer(QuantConfig("w4a6")).preprocess_model(model=unet, state_dict=tensors)
        change(tensors)
        refused(
            lambda: DMQuantizer(QuantConfig("w4a6")).preprocess_model(model=unet, state_dict=tensors),
            f"^the checkpoint of this UNet2DConditionModel .*{match}",
        )


@pytest.mark.parametrize("recipe", [None, 5, ["rtn"]])
def test_what_is_no_recipe_is_said_to_be_none(recipe):
    with pytest.raises(UsageError, match=f"not {type(recipe).__name__}"):
        QuantConfig(recipe)


@pytest.mark.parametrize(
    "config", [{"num_layers": 11}, {"text": {"num_hidden_layers": 11}}, {"depths": [2, 11]}, {"head_dim": 10**9}]
)
def test_numbers_that_do_not_go_with_the_files(config):
    tensors = [torch.empty(8, 8, device="meta")] * 10
    with pytest.raises(UserError, match="but its files hold"):
        check_sizes(config, tensors, "config.json")
    check_sizes({"num_layers": 10, "layer_norm_eps": 1e-6, "eos_token_id": 10**9, "layers": None}, tensors, "")


def test_a_model_of_too_many_layers_is_stopped_while_it_is_built():
    with pytest.raises(UserError, match="many more layers than the 4 tensors"), bounded(4, "config.json"):
        torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(10**9))
    torch.nn.Linear(2, 2)
