"""A LoRA that learns on top of a quantized backbone: whither its gradients point, and what they keep."""

import copy
from importlib.resources import files

import pytest
import torch
from torch.utils._pytree import tree_map_only

import dmquant
from dmquant.layers import QUANTIZED

peft = pytest.importorskip("peft")
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]
BACKBONES = {
    "emoji-sd": ("unet", {}),
    "emoji-pixart": ("transformer", {"use_resolution_binning": False, "max_sequence_length": 24}),
}
PROMPTS = ["a red heart", "a cat with a hat"]


@pytest.fixture(scope="module", params=BACKBONES)
def case(request):
    """An embedded backbone in full precision and at W4A6, both with one LoRA, and calls as its pipeline makes them."""
    pipe = dmquant.load_pipeline(files("dmquant.pipelines") / "assets" / request.param)
    part, options = BACKBONES[request.param]
    full, calls = getattr(pipe, part), []
    hook = full.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0), **options)
    hook.remove()
    quantized = copy.deepcopy(full)
    dmquant.quantize_(quantized, "w4a6")
    return adapted(full), adapted(quantized), calls


def adapted(model):
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=ADAPTED), model.requires_grad_(False))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(learnt(model)):
        parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def learnt(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def gradient(model, calls, autocast=False):
    """The gradient of the squared distance to random images, which is nowhere small, by all of the LoRA."""
    generator = torch.Generator().manual_seed(0)
    model.zero_grad()
    for args, kwargs in calls:
        args, kwargs = tree_map_only(torch.Tensor, lambda one: cast(one, model.dtype), (args, kwargs))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predicted = model(*args, **kwargs | {"return_dict": True}).sample
        target = torch.randn(predicted.shape, generator=generator)
        (predicted.float() - target).square().mean().backward()
    return torch.cat([parameter.grad.float().flatten() for _, parameter in sorted(learnt(model))])


def cast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cosine(one, other):
    return torch.cosine_similarity(one, other, dim=0).item()


def test_gradients_point_where_those_of_full_precision_do(case):
    full, quantized, calls = case
    assert cosine(gradient(full, calls), gradient(quantized, calls)) > 0.9


def test_checkpointing_changes_no_bit_and_layers_hold_codes_alone(case):
    _, quantized, calls = case
    plain = gradient(quantized, calls)
    quantized.enable_gradient_checkpointing()
    assert torch.equal(gradient(quantized, calls), plain)
    quantized.disable_gradient_checkpointing()
    layers = [layer for layer in quantized.modules() if isinstance(layer, tuple(QUANTIZED.values()))]
    assert not any(list(layer.buffers()) for layer in layers)


def test_training_in_bfloat16_goes_the_same_way(case):
    _, quantized, calls = case
    plain, half = gradient(quantized, calls), copy.deepcopy(quantized).to(torch.bfloat16)
    assert cosine(gradient(quantized, calls, autocast=True), plain) > 0.95
    assert cosine(gradient(half, calls), plain) > 0.95
