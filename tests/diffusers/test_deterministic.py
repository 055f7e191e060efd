"""Under `deterministic` an image is to the bit what it is alone, whatever its batch and however its layers multiply."""

import accelerate
import pytest
import torch
from torch import nn

import dmquant
from dmquant.diffusers.calling import call_pipeline
from dmquant.diffusers.families import families
from dmquant.recipe import Recipe
from tests.tiny import TINY, marked

STEPS = 2


def made(pipeline, tiny, indices):
    """Images of some prompts, each with the seed of its number."""
    call = {"num_inference_steps": STEPS, "height": tiny.size, "width": tiny.size, **tiny.call}
    prompted = families()[tiny.family].prompted(pipeline)
    prompts = [tiny.prompts[index] for index in indices]
    return torch.as_tensor(call_pipeline(prompted, prompts, [7 + index for index in indices], "np", call))


def quantized(tiny, recipe):
    pipeline = tiny.build()
    dmquant.quantize_(getattr(pipeline, families()[tiny.family].component), recipe)
    return pipeline


@pytest.mark.parametrize(
    "model",
    [
        "pixart-sigma",
        "sdxl",
        "hunyuan-1.1",
        "sd3",
        "flux",
        "sana",
        "dit",
        *marked(["flux2", "flux2-klein", "chroma", "hunyuanimage", "cogview4", "auraflow", "wan", "wan-22"]),
    ],
)
def test_an_image_is_the_same_alone_and_in_any_batch(model):
    tiny = TINY[model]
    pipeline = quantized(tiny, "w4a6")
    kinds = {name: type(part) for name, part in pipeline.components.items()}
    with dmquant.deterministic(pipeline):
        whole = made(pipeline, tiny, range(4))
        assert torch.equal(made(pipeline, tiny, [2]), whole[2:3])
        assert torch.equal(made(pipeline, tiny, [3, 1]), whole[[3, 1]])
    assert {name: type(part) for name, part in pipeline.components.items()} == kinds
    plain = made(pipeline, tiny, range(4))
    assert (whole - plain).abs().mean() < 0.02  # it is the same model
    assert (whole[0] - whole[1]).abs().mean() > 0.02


def test_scales_of_the_whole_input_are_those_of_the_image_alone():
    tiny, recipe = TINY["sd15"], Recipe.load("rtn64", "int8", "int8").with_settings(activation_granularity="tensor")
    pipeline = quantized(tiny, recipe)
    assert (made(pipeline, tiny, [0, 1])[1] - made(pipeline, tiny, [1])[0]).abs().max() > 1e-4
    with dmquant.deterministic(pipeline):
        assert torch.equal(made(pipeline, tiny, [0, 1])[1], made(pipeline, tiny, [1])[0])


def test_offloaded_parts_compute_one_row_at_a_time_as_well():
    tiny = TINY["pixart-sigma"]
    pipeline = quantized(tiny, "w4a6")
    with dmquant.deterministic(pipeline):
        expected = made(pipeline, tiny, range(3))
    pipeline.enable_model_cpu_offload(device="cpu")
    with dmquant.deterministic(pipeline):
        assert torch.equal(made(pipeline, tiny, [2, 0]), expected[[2, 0]])


class Model(nn.Module):
    """Notes how many rows it is given."""

    def __init__(self):
        super().__init__()
        self.layer, self.rows = nn.Linear(4, 4), []

    def forward(self, sample, timestep, text=None, tables=(), scale=1.0):
        self.rows.append(len(sample))
        noted = {"sample": self.layer(sample), "every": [sample * scale, timestep]}
        return noted, text, tables


class Doubling(nn.Module):
    def forward(self, sample):
        return sample * 2


class ListModel(nn.Module):
    def forward(self, images, timesteps):
        return [image * time for image, time in zip(images, timesteps, strict=True)], "eager"


class Pipeline:
    def __init__(self, model):
        self.components = {"unet": model, "tokenizer": object(), "safety_checker": model}


def test_arguments_and_outputs_of_any_structure_are_cut_and_joined():
    model, sample, time, text = Model(), torch.randn(3, 4), torch.tensor(7.0), torch.randn(3, 5, 2)
    tables = (torch.randn(1, 4), {"ids": torch.randn(3, 6)})
    hooked = []
    model.register_forward_pre_hook(lambda module, args: hooked.append(args[0].is_contiguous() and len(args[0])))
    expected = model(sample, time, text=text, tables=tables, scale=2.0)
    with dmquant.deterministic(Pipeline(model)):
        noted, out_text, out_tables = model(
            sample.t().contiguous().t(), time.expand(3), text=text, tables=tables, scale=2
        )
    assert model.rows == [3, 1, 1, 1]
    assert hooked == [3, 1, 1, 1]
    assert torch.allclose(noted["sample"], expected[0]["sample"], atol=1e-6)
    assert torch.equal(noted["every"][0], sample * 2)
    assert torch.equal(noted["every"][1], time.expand(3))
    assert torch.equal(out_text, text)
    assert torch.equal(out_tables[1]["ids"], tables[1]["ids"])
    assert model(sample, time)[1] is None
    assert model.rows[-1] == 3


def test_a_model_that_takes_lists_is_given_lists_of_one():
    images, model = [torch.randn(2, 4, 4), torch.randn(2, 4, 6)], ListModel()
    with dmquant.deterministic(Pipeline(model)):
        made, name = model(images, torch.tensor([2.0, 3.0]))
    assert torch.equal(made[0], images[0] * 2)
    assert torch.equal(made[1], images[1] * 3)
    assert name == "eager"


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models_are_called_with_one_row_at_a_time(in_place):
    model, shapes = Doubling(), []

    def backend(graph, examples):
        shapes.extend(each.shape for each in examples)
        return graph

    expected, sample = model(torch.ones(3, 4)), torch.ones(3, 4)
    options = {"backend": backend, "dynamic": False}
    compiled = model if in_place else torch.compile(model, **options)
    if in_place:
        model.compile(**options)
    with dmquant.deterministic(Pipeline(compiled)):
        assert torch.allclose(compiled(sample), expected)
    assert shapes == [(1, 4)]
    assert torch.allclose(compiled(sample), expected)
    assert shapes == [(1, 4), (3, 4)]


def test_gradients_go_through():
    model, sample = Model(), torch.randn(2, 4, requires_grad=True)
    with dmquant.deterministic(Pipeline(model)):
        model(sample, torch.tensor(1.0))[0]["sample"].sum().backward()
    assert torch.allclose(sample.grad, model.layer.weight.sum(0).expand(2, 4))


def test_parts_are_restored_after_an_error_and_hooks_of_offloading_stay():
    model = Model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(TypeError), dmquant.deterministic(Pipeline(model)):
        model(torch.ones(2, 4))
    assert type(model) is Model
    assert hasattr(model, "_hf_hook")
