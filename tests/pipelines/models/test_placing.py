"""Offloading is diffusers' own; here the CPU stands for the device, so that everything is as without it."""

import pytest
import torch
from diffusers import DiffusionPipeline

from dmquant.convert import quantize_
from dmquant.diffusers.calling import final_latents
from dmquant.errors import UserError
from dmquant.pipelines.api import _is_hooked
from dmquant.pipelines.models.placing import OFFLOADS, end_offloading, place, place_backbone_alone
from tests.tiny import tiny_dit

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "use_resolution_binning": False}


def latents(pipeline):
    return final_latents(pipeline, ["a red circle", "a blue square"], 0, CALL)


def hooked(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name for name, part in parts.items() if any(map(_is_hooked, part.modules()))}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("quantized", [False, True])
def test_an_offloaded_pipeline_makes_the_same_latents_and_ends_with_its_backbone_alone(original, how, quantized):
    plain, offloaded = (DiffusionPipeline.from_pretrained(original) for _ in range(2))
    for pipeline in (plain, offloaded) if quantized else ():
        quantize_(pipeline.transformer, "w4a6")
    place(plain, "cpu", None)
    place(offloaded, "cpu", how)
    assert not hooked(plain)
    assert {"text_encoder", "transformer", "vae"} <= hooked(offloaded)
    assert torch.equal(latents(offloaded), latents(plain))
    place_backbone_alone(offloaded, "transformer", "meta")
    assert not hooked(offloaded)
    places = {name: {p.device.type for p in offloaded.components[name].parameters()} for name in ("transformer", "vae")}
    assert places == {"transformer": {"meta"}, "vae": {"cpu"}}
    end_offloading(plain)  # which is not


def test_blocks_of_the_backbone_and_layers_of_other_parts_go_one_by_one(original):
    pipeline = place(DiffusionPipeline.from_pretrained(original), "cpu", "group")
    own = {name for name, module in pipeline.transformer.named_modules() if _is_hooked(module)}
    assert own == {
        "",
        *(f"transformer_blocks.{number}" for number in range(len(pipeline.transformer.transformer_blocks))),
    }
    layers = [name for name, module in pipeline.text_encoder.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(_is_hooked(pipeline.text_encoder.get_submodule(name)) for name in layers)


def test_a_backbone_that_diffusers_does_not_offload_so_is_one_line():
    with pytest.raises(UserError, match=r"^diffusers does not offload a DiT\S+ block by block: use --offload model$"):
        place(tiny_dit(), "cpu", "group")
