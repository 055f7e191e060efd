"""Offloading is diffusers' own; here the CPU stands for the device, so that everything is as without it."""

import torch
from diffusers import DiffusionPipeline

from dmquant.diffusers.calling import final_latents
from dmquant.pipelines.models.placing import place, place_backbone_alone

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "use_resolution_binning": False}


def latents(pipeline):
    return final_latents(pipeline, ["a red circle", "a blue square"], 0, CALL)


def hooked(pipeline):
    return {name for name, part in pipeline.components.items() if hasattr(part, "_hf_hook")}


def test_an_offloaded_pipeline_makes_the_same_latents_and_ends_with_its_backbone_alone(original):
    plain = place(DiffusionPipeline.from_pretrained(original), "cpu", offload=False)
    offloaded = place(DiffusionPipeline.from_pretrained(original), "cpu", offload=True)
    assert not hooked(plain)
    assert {"text_encoder", "transformer", "vae"} <= hooked(offloaded)
    assert torch.equal(latents(offloaded), latents(plain))
    place_backbone_alone(offloaded, "transformer", "meta")
    assert not hooked(offloaded)
    places = {name: {p.device.type for p in offloaded.components[name].parameters()} for name in ("transformer", "vae")}
    assert places == {"transformer": {"meta"}, "vae": {"cpu"}}
