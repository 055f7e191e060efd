"""What the family files say, against the real architectures at full size and against what the real pipelines do."""

import fnmatch
import functools
from collections import Counter

import pytest
import torch
from torch import nn

from dmquant.diffusers.calling import call_pipeline
from dmquant.diffusers.families import GENERIC, ends, families, family_of
from dmquant.errors import UserError
from dmquant.pipelines.models.registry import registered_models
from tests.calib.runs import call_of
from tests.diffusers.architectures import ARCHITECTURES
from tests.tiny import TINY

STRAYS = {
    # Each of SDXL's transformers is cut into its blocks; what is before and after them is a unit of its own.
    "sdxl": {"*.attentions.*.proj_in": 11, "*.attentions.*.proj_out": 11},
}
CONCATENATIONS = {"sd15": 12, "sdxl": 9, "hunyuan-1.1": 19, "hunyuan": 19, "flux-dev": 38, "flux-schnell": 38}
CONCATENATIONS |= {"flux2-dev": 48, "flux2-klein-4b": 20, "flux2-klein-9b": 24, "chroma": 38, "hunyuanimage": 40}
LEARNED_SIGMA = ("pixart-alpha-1024", "pixart-sigma", "hunyuan-1.1", "hunyuan-1.2", "sana", "dit")


@functools.cache
def backbone_of(name):
    return ARCHITECTURES[name].build()


@functools.cache
def pipeline_of(name):
    """A tiny pipeline, not to be changed."""
    return TINY[name].build()


def layers_of(backbone):
    return {name: each for name, each in backbone.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}


def kept_of(keep, layers):
    return {name for glob in keep for name in fnmatch.filter(layers, glob)}


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_the_architecture_is_the_published_one(name):
    assert sum(parameter.numel() for parameter in backbone_of(name).parameters()) == ARCHITECTURES[name].parameters


def test_every_family_and_every_preset_has_an_architecture_here():
    assert {each.family for each in ARCHITECTURES.values()} == families().keys() - {GENERIC}
    twins = {"pixart-alpha-512": "pixart-sigma", "dit-512": "dit-256", "flux2-klein-base-9b": "flux2-klein-9b"}
    twins |= {"qwenimage-edit": "qwenimage", "qwenimage-edit-plus": "qwenimage", "flux-kontext": "flux-dev"}
    twins["wan2.2-14b"] = "wan2.1-14b"
    downloaded = [name for name, spec in registered_models().items() if not spec.is_embedded]
    assert {twins.get(name, name) for name in downloaded} == ARCHITECTURES.keys()
    for name in downloaded:
        assert registered_models()[name].family == ARCHITECTURES[twins.get(name, name)].family


@every_architecture
def test_every_layer_is_in_one_block_or_kept_or_a_listed_stray(name):
    family, backbone = families()[ARCHITECTURES[name].family], backbone_of(name)
    layers, blocks = layers_of(backbone), family.blocks(backbone)
    owners = {layer: [block for block in blocks if layer.startswith(f"{block}.")] for layer in layers}
    assert max(map(len, owners.values())) == 1
    assert {owner for found in owners.values() for owner in found} == set(blocks)
    outside = {layer for layer, found in owners.items() if not found} - kept_of(family.keep, layers)
    strays = STRAYS.get(name, {})
    assert outside == kept_of(strays, layers)
    assert {glob: len(fnmatch.filter(layers, glob)) for glob in strays} == strays


@pytest.mark.parametrize("name", sorted(families().keys() - {GENERIC}))
def test_every_glob_of_kept_layers_matches_a_layer_and_says_why(name):
    backbones = [backbone_of(each) for each, found in ARCHITECTURES.items() if found.family == name]
    layers = {layer for backbone in backbones for layer in layers_of(backbone)}
    for glob, why in families()[name].keep.items():
        assert fnmatch.filter(layers, glob), glob
        assert len(why) > 10


@every_architecture
def test_what_is_kept_is_a_small_part(name):
    layers = layers_of(backbone_of(name))
    kept = kept_of(families()[ARCHITECTURES[name].family].keep, layers)
    weights = {layer: module.weight.numel() for layer, module in layers.items()}
    assert sum(weights[layer] for layer in kept) < 0.07 * sum(weights.values())


@every_architecture
def test_blocks_run_once_each_and_concatenations_are_where_the_forward_pass_has_them(name, monkeypatch):
    architecture, backbone = ARCHITECTURES[name], backbone_of(name)
    family = families()[architecture.family]
    splits, ran, halves, concatenated = family.concatenations(backbone), Counter(), {}, []
    concatenate = torch.cat

    def cat(tensors, dim=0, **kwargs):
        concatenated.append([tensor.shape[dim] for tensor in tensors])
        return concatenate(tensors, dim=dim, **kwargs)

    def note(layer):
        return lambda module, args: halves.update({layer: concatenated[-1]})

    monkeypatch.setattr(torch, "cat", cat)
    hooks = [backbone.get_submodule(layer).register_forward_pre_hook(note(layer)) for layer in splits]
    for block in family.blocks(backbone):
        count = functools.partial(lambda block, module, args, output: ran.update([block]), block)
        hooks.append(backbone.get_submodule(block).register_forward_hook(count))
    try:
        architecture.call(backbone)
    finally:
        for hook in hooks:
            hook.remove()

    assert ran == Counter(family.blocks(backbone))
    assert len(splits) == CONCATENATIONS.get(name, 0)
    for layer, first in splits.items():
        module = backbone.get_submodule(layer)
        width = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
        assert len(halves[layer]) == 2
        assert (halves[layer][0], sum(halves[layer])) == (first, width)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_split_layers_of_a_unet_are_the_shortcuts_of_its_way_up(name):
    shortcuts = {layer for layer in layers_of(backbone_of(name)) if layer.endswith("conv_shortcut")}
    assert families()["unet"].concatenations(backbone_of(name)).keys() == {
        layer for layer in shortcuts if layer.startswith("up_blocks.")
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_generic_family_keeps_what_is_outside_of_the_blocks(name):
    """What a family keeps for its own reasons inside of blocks, and the strays, are not known to it."""
    backbone, family = backbone_of(name), families()[ARCHITECTURES[name].family]
    layers, blocks = layers_of(backbone), tuple(f"{block}." for block in family.blocks(backbone))
    kept = kept_of({**families()[GENERIC].keep, **ends(backbone)}, layers)
    outside = {layer for layer in layers if not layer.startswith(blocks)} - kept_of(STRAYS.get(name, {}), layers)
    assert outside <= kept
    assert not {layer for layer in kept if layer.startswith(blocks)} - kept_of(family.keep, layers)
    assert {next(iter(layers)), list(layers)[-1]} <= kept
    assert families()[GENERIC].blocks(backbone) == []


def first_call(name, prompts):
    """What the backbone of a tiny pipeline was given and returned at the first step."""
    pipeline = pipeline_of(name)
    family = family_of(pipeline)
    calls = []
    backbone = getattr(pipeline, family.component)
    hook = backbone.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    try:
        call = call_of(name, 2)
        call_pipeline(family.prompted(pipeline), prompts, range(len(prompts)), "latent", call)
    finally:
        hook.remove()
    return calls[0]


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_pipelines_belong_to_the_families(name):
    pipeline = pipeline_of(name)
    family = family_of(pipeline)
    assert family.name == TINY[name].family
    assert type(pipeline).__name__ in family.pipelines


@pytest.mark.parametrize("name", TINY)
def test_all_rows_of_a_call_share_what_the_family_says_and_nothing_else(name):
    """Arguments but those of one number have a row for every prompt, and with guidance in rows two."""
    family = families()[TINY[name].family]
    prompts = list(TINY[name].prompts[:3])
    rows = len(prompts) * (2 if family.guidance == "rows" else 1)
    args, kwargs, output = first_call(name, prompts)

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return [tensor for each in inside for tensor in tensors(each)]

    for value in [*args, *(value for key, value in kwargs.items() if key not in family.shared)]:
        assert all(tensor.dim() == 0 or tensor.shape[0] == rows for tensor in tensors(value))
    assert output.shape[0] == rows
    alone = first_call(name, prompts[:1])[1]
    for key in family.shared:
        together = tensors(kwargs[key])
        assert together
        assert all(map(torch.equal, together, tensors(alone[key])))


@pytest.mark.parametrize("name", LEARNED_SIGMA)
def test_the_features_that_count_are_those_of_the_channels_that_the_sampler_uses(name):
    """The projection is made to write its features' numbers: those in the first half of the output must count."""
    pipeline = TINY[name].build()
    family = family_of(pipeline)
    backbone = getattr(pipeline, family.component)
    ((layer, counted),) = family.counted(backbone).items()
    projection = backbone.get_submodule(layer)
    nn.init.zeros_(projection.weight)
    projection.bias.data = torch.arange(projection.out_features, dtype=projection.bias.dtype)
    outputs = []
    backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    tiny = TINY[name]
    call = {"height": tiny.size, "width": tiny.size, "num_inference_steps": 2, **tiny.call}
    call_pipeline(family.prompted(pipeline), [tiny.prompts[0]], [0], "latent", call)
    used = outputs[0][:, : backbone.config.in_channels].unique().tolist()
    assert used == counted.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "name",
    [
        "sd15",
        "sdxl",
        "sd3",
        "flux",
        "flux2",
        "flux2-klein",
        "chroma",
        "hunyuanimage",
        "qwenimage",
        "cogview4",
        "auraflow",
        "wan",
        "wan-22",
    ],
)
def test_every_feature_counts_where_no_variance_is_learned(name):
    assert (
        families()[TINY[name].family].counted(getattr(pipeline_of(name), family_of(pipeline_of(name)).component)) == {}
    )


def test_a_class_conditional_pipeline_is_called_with_names_or_numbers_of_classes():
    pipeline = pipeline_of("dit")
    prompted = families()["dit"].prompted(pipeline)
    assert prompted.transformer is pipeline.transformer
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    images = call_pipeline(prompted, ["tench", "2"], [5, 6], "np", call)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    direct = pipeline([0, 2], num_inference_steps=2, guidance_scale=3.0, generator=generators, output_type="np").images
    assert (images == direct).all()
    latents = call_pipeline(prompted, ["tench", "2"], [5, 6], "latent", call)
    assert latents.shape == (2, 4, 16, 16)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(direct), atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "size", "says"),
    [
        ("a red cat", {}, "'a red cat' is no class of this model: a prompt is a number below 1000, or one of 4 names"),
        ("1000", {}, "no class"),
        ("-1", {}, "no class"),
        ("1", {"height": 64}, "images of 32x32 only, not 32x64"),
    ],
)
def test_a_class_conditional_pipeline_refuses_what_it_cannot_make(prompt, size, says):
    with pytest.raises(UserError, match=says):
        families()["dit"].prompted(pipeline_of("dit"))(prompt, **size)
