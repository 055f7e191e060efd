"""What apps and trainers do with a model: threads, doubles, gradients, averages, tracing, export."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dmquant.convert import quantize_
from tests.tiny import tiny_pixart, tiny_sd

from diffusers.training_utils import EMAModel  # isort: skip

TEXT = {"encoder_attention_mask": None, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


class Called(nn.Module):
    """A PixArt transformer as a function of tensors."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, latents, text, timestep):
        return self.backbone(latents, text, timestep, **TEXT, return_dict=False)[0]


@pytest.fixture(scope="module", params=["w4a6", "w8a8", "w4a16"])
def called(request):
    backbone = tiny_pixart().transformer
    quantize_(backbone, request.param)
    return Called(backbone).eval()


@pytest.fixture(scope="module")
def given():
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 5, 32, generator=draw)
    return latents, text, torch.tensor([999, 500])


@torch.no_grad()
def output(called, given):
    return called(*given)


def test_many_threads_call_one_model_also_the_first_time(called, given):
    expected = output(called, given)
    for model in (called, copy.deepcopy(called)):  # a copy has chosen no kernel yet
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, model=model: output(model, given), range(16)))
        assert all(torch.equal(one, expected) for one in found)


def test_a_model_in_double_computes_in_double(called, given):
    expected = output(called, given)
    wide = copy.deepcopy(called).double()
    latents, text, timestep = given
    found = output(wide, (latents.double(), text.double(), timestep))
    assert found.dtype == torch.float64
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-5 if called.backbone.hf_quantizer.quantization_config.recipe.activations == "none" else 0.1)


def test_requires_grad_is_of_what_has_gradients(called):
    backbone = copy.deepcopy(called.backbone)
    assert backbone.requires_grad_(True) is backbone
    floats = [one.is_floating_point() for one in backbone.parameters()]
    assert [one.requires_grad for one in backbone.parameters()] == floats
    assert any(floats)
    assert not any(one.requires_grad for one in backbone.requires_grad_(False).parameters())


def test_an_average_of_the_parameters_keeps_the_codes(called, given):
    backbone, expected = copy.deepcopy(called.backbone), output(called, given)
    average = EMAModel(backbone.parameters(), decay=0.5)
    average.step(backbone.parameters())
    average.store(backbone.parameters())
    average.copy_to(backbone.parameters())
    assert torch.equal(output(Called(backbone), given), expected)
    average.restore(backbone.parameters())
    assert torch.equal(output(Called(backbone), given), expected)


def test_jit_trace_is_refused_in_one_line(called, given):
    with pytest.raises(RuntimeError, match=r"^torch.jit.trace takes no packed codes: use torch.compile, or dequantize"):
        torch.jit.trace(called, given)


def test_a_graph_of_torch_export_gives_the_reference(called, given):
    from dmquant import kernels

    with torch.no_grad(), kernels.forced("reference"):
        expected = called(*given)
        found = torch.export.export(called, given).module()(*given)
    assert torch.allclose(found, expected, atol=1e-5)


def test_onnx_takes_a_dequantized_model(tmp_path):
    """A UNet: of PixArt's transformer, quantized or not, torch 2.13 exports what onnxruntime 1.32 does not load."""
    pytest.importorskip("onnxscript", reason="installed apart from what the other tests need, see .ci/run")
    runtime = pytest.importorskip("onnxruntime")
    unet = tiny_sd().unet
    quantize_(unet, "w4a16")
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 5, 32, generator=draw)
    given = latents, torch.tensor([999, 500]), text
    expected = output(unet, given)[0]
    unet.dequantize()
    torch.onnx.export(unet, given, kwargs={"return_dict": False}, dynamo=True).save(tmp_path / "unet.onnx")
    session = runtime.InferenceSession(tmp_path / "unet.onnx")
    fed = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), given, strict=True)}
    assert torch.allclose(torch.from_numpy(session.run(None, fed)[0]), expected, atol=1e-4)
