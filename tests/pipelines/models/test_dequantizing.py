"""`--source-quantized dequantize`: what dmquant or others quantized already, as full precision to start from."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmquant import quantize_pipeline
from dmquant.diffusers.saving import save_pipeline
from dmquant.errors import UsageError, UserError
from dmquant.layers import QUANTIZED
from dmquant.pipelines.commands.exporting import export
from dmquant.pipelines.models.dequantizing import dequantize_parts
from dmquant.pipelines.models.loading import checked_folder, load_full_precision, load_pipeline
from dmquant.pipelines.models.registry import as_source, resolve_model
from dmquant.recipe import Recipe
from tests.tiny import tiny_pixart
from tests.tiny.parts import t5

PLAIN = Recipe.load("for-torchao").in_formats(None, "none").with_settings(scale="absmax", rounding="nearest")
FOLDERS = ("torchao", "compressed-tensors")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A pipeline that dmquant saved, its text encoder quantized too."""
    folder, pipeline = tmp_path_factory.mktemp("own") / "model", tiny_pixart()
    pipeline.text_encoder = t5(pipeline.tokenizer, blocks=3).eval()  # the last of which stays as it is
    quantize_pipeline(pipeline, "rtn", w="nvfp4", components={"text_encoder": "w8a16"})
    save_pipeline(pipeline, folder)
    return folder


@pytest.fixture(scope="module", params=FOLDERS)
def theirs(request, own, tmp_path_factory):
    """The same in the folder of another engine, its text encoder in full precision."""
    folder = tmp_path_factory.mktemp("theirs") / request.param
    recipe = PLAIN if request.param == "torchao" else Recipe.load(f"for-{request.param}").in_formats(None, "none")
    pipeline = tiny_pixart()
    quantize_pipeline(pipeline, recipe.with_settings(scale="absmax", rounding="nearest"))
    save_pipeline(pipeline, folder.with_name("own"))
    export(folder.with_name("own"), request.param, folder, False)
    return folder


def load(folder, dtype=torch.float32):
    spec = as_source(resolve_model(str(folder)), (), "dequantize")
    return load_full_precision(spec, dtype, "cpu", lambda line: None)


def is_quantized(module):
    return any(isinstance(one, tuple(QUANTIZED.values())) for one in module.modules())


def test_every_part_that_dmquant_quantized_is_what_its_own_dequantize_gives(own):
    pipeline, expected = load(own), load_pipeline(own, dtype=torch.float32)
    assert is_quantized(expected.transformer)
    assert is_quantized(expected.text_encoder)
    for name in ("transformer", "text_encoder"):
        part, other = getattr(pipeline, name), getattr(expected, name)
        other.dequantize()
        assert not is_quantized(part)
        state, wanted = part.state_dict(), other.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[each], wanted[each]) for each in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_hold_is_decoded_into_an_ordinary_model(theirs, dtype):
    part, expected = load(theirs, dtype).transformer, load(theirs.with_name("own"), dtype).transformer
    assert type(part) is type(expected)
    assert {type(one) for one in part.modules()} == {type(one) for one in expected.modules()}
    state, wanted = part.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.allclose(state[each], wanted[each], rtol=2**-7, atol=0) for each in state)
    buffers, original = dict(part.named_buffers()), dict(tiny_pixart().transformer.to(dtype).named_buffers())
    assert buffers.keys() == original.keys()  # those that no file holds are made as a model that is loaded has them
    assert all(torch.equal(buffers[each], original[each]) for each in buffers)


def test_it_is_quantized_again_like_any_model(theirs, tmp_path):
    pipeline = load(theirs)
    quantize_pipeline(pipeline, "rtn")
    save_pipeline(pipeline, tmp_path / "again")
    assert is_quantized(load_pipeline(tmp_path / "again").transformer)


def test_by_default_it_is_refused_and_told_how(own, theirs):
    for folder, method in ((own, "dmquant"), (theirs, theirs.name)):
        with pytest.raises(UserError, match=rf"already quantized \(by {method}\).*--source-quantized dequantize"):
            checked_folder(resolve_model(str(folder)), print)
    with pytest.raises(UsageError, match="did you mean 'dequantize'"):
        as_source(resolve_model(str(own)), (), "dequantise")


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()  # by which torchao's are known
    del tensors["scale_shift_table"]
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"lacks scale_shift_table of PixArtTransformer2DModel"):
        load(tmp_path / "model")


def test_a_method_that_nobody_here_can_undo_is_named():
    def refuse():
        raise NotImplementedError

    config = SimpleNamespace(quant_method="quanto")
    part = SimpleNamespace(hf_quantizer=SimpleNamespace(quantization_config=config), dequantize=refuse)
    with pytest.raises(
        UserError, match=r"^the unet is quantized by quanto, which cannot be undone: NotImplementedError$"
    ):
        dequantize_parts(SimpleNamespace(components={"unet": part, "vae": None}), torch.float32)


def test_files_of_others_are_known_without_a_label_in_the_configuration(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    if theirs.name == "torchao":  # whose tensors say what they are
        del config["quantization_config"]
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"already quantized \(by torchao\)"):
            checked_folder(resolve_model(str(tmp_path / "model")), print)
