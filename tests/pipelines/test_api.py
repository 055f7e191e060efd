"""The Python interface: a loaded pipeline is quantized in place, with and without data, or told why not."""

import copy
import fnmatch
import json
import logging
from functools import partial

import accelerate
import pytest
import torch
from PIL import Image

import dmquant
from dmquant.convert import layers_in, quantize_
from dmquant.diffusers.families import family_of
from dmquant.errors import UsageError, UserError
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.pipelines import api
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.loras import Lora
from dmquant.pipelines.models.registry import resolve_model
from dmquant.pipelines.runs import settings
from dmquant.recipe import Recipe
from tests.tiny import IMAGE_SIZE, PIXART_CALL, TINY, marked, tiny_pixart, tiny_sd

from diffusers import ControlNetModel, DiffusionPipeline, EulerDiscreteScheduler  # isort: skip
from diffusers import StableDiffusionControlNetPipeline, UNet2DConditionModel  # isort: skip
from diffusers.hooks import apply_group_offloading  # isort: skip
from diffusers.models.attention_processor import AttnProcessor  # isort: skip

PROMPTS = ["a red cat", "a blue boat", "a tree", "a face"]
CALL = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 3, "guidance_scale": 3.0}
EMBEDS = torch.zeros(4, 16, 32)
PLAIN_BLOCKS = {  # without any attention to the text
    "down_block_types": ("DownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 2,
}
PIPELINES = {"pixart": (tiny_pixart, PIXART_CALL), "sd": (tiny_sd, {})}
LEARNED = Recipe.model_validate(
    {
        "name": "learned",
        "granularity": "group:16",
        "rounding": {"method": "adaround", "regularizer": 10.0},
        "calibration": {"prompts": 4, "steps_per_prompt": 2, "held_out": 0.25},
        "learning": {"iterations": 3, "batch_size": 2, "checks": 1},
    }
)


FITTED = LEARNED.with_settings(name="fitted", rounding="nearest", scale="hessian")
MIDDLE = FITTED.with_settings(rules=[{"match": "*", "keep": True}, {"match": "mid_block.*", "keep": False}])


def backbone_of(pipe):
    return getattr(pipe, family_of(pipe).component)


def images(pipe, prompt="a red cat", **call):
    draw = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=draw, output_type="pt", **(CALL | call)).images


@pytest.mark.parametrize("how", ["model", "group"])
def test_offloaded_calibration_gives_the_same_weights_and_a_pipeline_without_hooks(how):
    plain, offloaded = tiny_sd(), tiny_sd()
    dmquant.quantize_pipeline(plain, MIDDLE, calibration=PROMPTS, **CALL)
    dmquant.quantize_pipeline(offloaded, MIDDLE, calibration=PROMPTS, offload=how, device="cpu", **CALL)
    assert same_weights(plain.unet, offloaded.unet)
    parts = [part for part in offloaded.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(api._is_hooked(module) for part in parts for module in part.modules())
    assert torch.equal(images(plain), images(offloaded))


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def recorded(backbone):
    return backbone.config["quantization_config"]


@pytest.mark.parametrize("kind", marked())
def test_one_name_gives_one_model_by_every_door_and_changes_nothing_but_the_backbone(kind, tmp_path):
    tiny = TINY[kind]
    pipe, original = tiny.build(), tiny.build(tmp_path)
    family, expected = family_of(original), backbone_of(original)
    call = {"height": tiny.size, "width": tiny.size, "num_inference_steps": 2}
    made = dmquant.quantize_pipeline(pipe, "w4a6", **call, **tiny.call)
    by_command = settings.resolve(settings.Options(model=str(tmp_path), recipe="w4a6")).recipe_for(expected)
    assert made.recipe == by_command == Recipe.load("w4a6").for_model(family.known(expected))
    kept = {name for glob in family.keep for name in fnmatch.filter(layers_in(expected), glob)}
    assert kept
    backbones = family.backbones_of(original)
    reports = [layer for backbone in backbones.values() for layer in quantize_(backbone, "w4a6")]
    assert [layer.plan for layer in made.layers] == [layer.plan for layer in reports]
    assert kept.isdisjoint(layer.plan.name for layer in reports)
    by_config = {"subfolder": family.component, "quantization_config": dmquant.QuantConfig("w4a6")}
    while_loading = type(expected).from_pretrained(tmp_path, **by_config)
    assert all(same_weights(getattr(pipe, name), backbone) for name, backbone in backbones.items())
    assert same_weights(while_loading, expected)
    assert recorded(backbone_of(pipe)) == recorded(expected) == recorded(while_loading)
    parts = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    others = parts - backbones.keys()
    assert "vae" in others
    assert all(same_weights(getattr(pipe, name), getattr(original, name)) for name in others)
    assert 4 < made.footprint.bits_per_weight < 5
    prompted, draw = family.prompted(pipe), torch.Generator().manual_seed(0)
    given = prompted(prompt=tiny.prompts[0], generator=draw, output_type="pt", **call, **tiny.call)
    made_images = given.frames if hasattr(given, "frames") else given.images
    assert made_images.shape[-2:] == (tiny.size, tiny.size)
    assert made_images.isfinite().all()


@pytest.mark.parametrize("recipe", ["w4a6", LEARNED], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_saved_pipeline_reloads_in_diffusers_bit_equal(kind, recipe, tmp_path):
    build, call = PIPELINES[kind]
    pipe, out = build(), tmp_path / "quantized"
    dmquant.quantize_pipeline(pipe, recipe, calibration=PROMPTS, out=out, **CALL, **call)
    loaded = DiffusionPipeline.from_pretrained(out)
    assert torch.equal(images(loaded, **call), images(pipe, **call))
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]
    assert "DiffusionPipeline.from_pretrained" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "kind",
    [
        "dit",
        "flux",
        "hunyuan-1.1",
        "sd3",
        *marked(["flux2", "flux2-klein", "chroma", "qwenimage", "cogview4", "auraflow", "wan", "wan-5b"]),
    ],
)
def test_pipelines_with_calls_of_their_own_kind_calibrate(kind):
    """Classes for prompts, guidance as an input, arguments that all rows share, two text streams."""
    tiny = TINY[kind]
    pipe, size = tiny.build(), {"height": tiny.size, "width": tiny.size}
    made = dmquant.quantize_pipeline(
        pipe, FITTED, calibration=tiny.prompts, num_inference_steps=2, guidance_scale=3.0, **size, **tiny.call
    )
    assert made.layers
    assert all(layer.error < 0.1 for layer in made.layers)


def test_a_calibrated_recipe_learns_from_the_pipeline_as_it_is_called():
    """Other prompts, or another guidance, and other codes come out; the same again, and the same do."""
    codes = []
    for prompts, guidance in ((PROMPTS, 3.0), (PROMPTS, 3.0), (PROMPTS[::-1], 3.0), (PROMPTS, 9.0)):
        pipe = tiny_pixart()
        call = CALL | PIXART_CALL | {"guidance_scale": guidance}
        dmquant.quantize_pipeline(pipe, FITTED, calibration=prompts, **call)
        codes.append(pipe.transformer)
    assert same_weights(codes[0], codes[1])
    assert not same_weights(codes[0], codes[2])
    assert not same_weights(codes[0], codes[3])


def test_the_call_is_as_it_will_be_made_for_one_prompt():
    """Each argument changes what the backbone is given, and so the codes; one that does not changes none."""
    seen = []

    def nudging(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 1.5}

    changes = [
        {},
        {"output_type": "latent", "return_dict": False},
        {"negative_prompt": "a blue boat"},
        {"negative_prompt": PROMPTS[::-1]},
        {"num_images_per_prompt": 2},
        {"callback_on_step_end": nudging},
        {"latents": torch.ones(1, 4, 16, 16)},
    ]
    codes = []
    for change in changes:
        pipe = tiny_sd()
        dmquant.quantize_pipeline(pipe, MIDDLE, calibration=PROMPTS, **CALL, **change)
        codes.append(pipe.unet)
    assert same_weights(codes[0], codes[1])
    assert not any(same_weights(codes[0], other) for other in codes[2:])
    assert seen.count(0) == 1 + len(PROMPTS)  # a rehearsal, and a call for each prompt


def test_embeddings_take_the_place_of_prompts_and_of_a_text_encoder():
    given, made = tiny_sd(), tiny_sd()
    with torch.no_grad():
        text, negative = made.encode_prompt(PROMPTS, "cpu", 1, True)
    made.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(UserError, match="has no text_encoder and no tokenizer, so it takes no prompts"):
        dmquant.quantize_pipeline(made, MIDDLE, calibration=PROMPTS, **CALL)
    dmquant.quantize_pipeline(made, MIDDLE, prompt_embeds=text, negative_prompt_embeds=negative[:1], **CALL)
    dmquant.quantize_pipeline(given, MIDDLE, calibration=PROMPTS, **CALL)
    of_embeddings = images(made, None, prompt_embeds=text[:1], negative_prompt_embeds=negative[:1])
    assert torch.nn.functional.mse_loss(of_embeddings, images(given)) < 1e-4


@pytest.mark.parametrize("optional", [{"mid_block_type": None}, {"time_cond_proj_dim": 8}, PLAIN_BLOCKS])
def test_a_unet_without_optional_parts_or_with_more(optional):
    pipe = tiny_sd()
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    pipe.unet = UNet2DConditionModel(**config | optional).eval()
    exact = images(pipe)
    made = dmquant.quantize_pipeline(pipe, FITTED, calibration=PROMPTS, **CALL)
    assert all(layer.error < 0.1 for layer in made.layers)
    assert torch.nn.functional.mse_loss(images(pipe), exact) < 1e-3


def test_prompts_and_steps_default_to_those_of_the_kind_of_pipeline(caplog):
    caplog.set_level(logging.INFO, logger="dmquant")
    given, default = tiny_pixart(), tiny_pixart()
    call = PIXART_CALL | {"guidance_scale": 3.0}
    dmquant.quantize_pipeline(given, FITTED, calibration="emoji-calibration", num_inference_steps=20, **call)
    dmquant.quantize_pipeline(default, FITTED, **call)
    assert same_weights(given.transformer, default.transformer)
    assert caplog.text.count("calibration data: 4 prompts") == caplog.text.count("over 20 steps") == 2


def test_hooks_and_references_of_layers_stay_through_calibration():
    pipe, calls = tiny_pixart(), []
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    dmquant.quantize_pipeline(pipe, FITTED, calibration=PROMPTS, **CALL, **PIXART_CALL)
    assert pipe.transformer.transformer_blocks[0].attn1.to_q is layer
    plain = tiny_pixart()
    hooked = plain.transformer.transformer_blocks[0].attn1.to_q
    handle = hooked.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    dmquant.quantize_pipeline(plain, FITTED, calibration=PROMPTS, **CALL, **PIXART_CALL)
    assert same_weights(plain.transformer, pipe.transformer)
    assert calls
    calls.clear()
    plain("red apple", output_type="latent", **CALL, **PIXART_CALL)
    assert set(calls) == {"QuantLinear"}
    handle.remove()


def test_a_calibration_whose_saving_failed_continues_in_the_same_folder(tmp_path, monkeypatch):
    out, save = tmp_path / "quantized", api.save_whole
    written = []

    def fail_once(*args):
        work = (tmp_path / ".quantized.dmquant" / "calibration").rglob("*.safetensors")
        written.append({path: path.stat().st_mtime_ns for path in work})
        if len(written) == 1:
            raise OSError("disk is full")
        save(*args)

    monkeypatch.setattr(api, "save_whole", fail_once)
    quantize = partial(dmquant.quantize_pipeline, recipe=LEARNED, calibration=PROMPTS, out=out, **CALL, **PIXART_CALL)
    with pytest.raises(OSError, match="disk is full"):
        quantize(tiny_pixart())
    quantize(tiny_pixart())
    assert written[0]
    assert written[0] == written[1]
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_a_stopped_calibration_is_not_continued_under_another_scheduler(tmp_path, monkeypatch):
    out, save = tmp_path / "quantized", api.save_whole
    monkeypatch.setattr(api, "save_whole", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dmquant.quantize_pipeline(tiny_sd(), MIDDLE, calibration=PROMPTS, out=out, **CALL)
    monkeypatch.setattr(api, "save_whole", save)
    changed, fresh = tiny_sd(), tiny_sd()
    for pipe in (changed, fresh):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    dmquant.quantize_pipeline(changed, MIDDLE, calibration=PROMPTS, out=out, **CALL)
    dmquant.quantize_pipeline(fresh, MIDDLE, calibration=PROMPTS, **CALL)
    assert same_weights(changed.unet, fresh.unet)


class TestRefusals:
    def spoil(self, unet, how):
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        if how == "compiled part":
            unet.mid_block.attentions[0] = torch.compile(unet.mid_block.attentions[0], backend="eager")
        elif how == "casting":
            unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        elif how == "shared layer":
            block.attn1.to_k = block.attn1.to_q
        elif how == "shared weight":
            block.attn1.to_k.weight = block.attn1.to_q.weight
        elif how == "other quantizer":
            unet.quantization_method = "torchao"

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("compiled part", r"layer mid_block\.attentions\.0 is compiled: quantize it first"),
            ("casting", r"the unet is offloaded or on the meta device, or casts its weights"),
            ("shared layer", r"layer \S+to_q shares its weight with another place"),
            ("shared weight", r"layer \S+to_q shares its weight with another place"),
            ("other quantizer", r"UNet2DConditionModel is quantized by torchao already"),
        ],
    )
    def test_a_backbone_that_is_not_plain_is_refused_before_any_data_is_captured(self, how, said, monkeypatch):
        monkeypatch.setattr("dmquant.pipelines.runs.calibration.capture", lambda *_, **__: pytest.fail("captured"))
        pipe = tiny_sd()
        self.spoil(pipe.unet, how)
        with pytest.raises(UserError, match=f"^{said}[^\n]*$"):
            dmquant.quantize_pipeline(pipe, FITTED, calibration=PROMPTS, **CALL)

    def test_a_backbone_that_no_family_knows(self):
        pipe = tiny_sd()
        pipe.unet.__class__ = type("StrangeUNet", (type(pipe.unet),), {})
        with pytest.raises(
            UserError, match=r"StrangeUNet.*known are .*UNet2DConditionModel.*dmquant\.quantize_\("
        ) as no:
            dmquant.quantize_pipeline(pipe, "rtn")
        assert "\n" not in str(no.value)

    @pytest.mark.parametrize("again", ["rtn", LEARNED], ids=["data-free", "calibrated"])
    def test_a_pipeline_that_is_quantized_already(self, again, tmp_path):
        pipe = tiny_sd()
        dmquant.quantize_pipeline(pipe, "rtn", out=tmp_path / "quantized")
        for quantized in (pipe, DiffusionPipeline.from_pretrained(tmp_path / "quantized")):
            with pytest.raises(UserError, match="the unet is already quantized: start from the full-precision"):
                dmquant.quantize_pipeline(quantized, again, calibration=PROMPTS, **CALL)

    def test_an_offloaded_pipeline_and_one_without_weights(self):
        by_layer, by_group, empty = tiny_sd(), tiny_sd(), tiny_sd()
        accelerate.cpu_offload(by_layer.unet, execution_device=torch.device("cpu"))
        cpu = torch.device("cpu")
        apply_group_offloading(by_group.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        empty.unet.to("meta")
        for pipe in (by_layer, by_group, empty):
            with pytest.raises(UserError, match=r"the unet is offloaded or on the meta device.*offloading after"):
                dmquant.quantize_pipeline(pipe, "rtn")

    def test_offloading_that_is_on_already_or_from_elsewhere_or_unknown(self):
        hooked, elsewhere = tiny_sd(), tiny_sd()
        accelerate.cpu_offload(hooked.text_encoder, execution_device=torch.device("cpu"))
        elsewhere.vae.to("meta")
        cases = [
            (hooked, "model", "the text_encoder is not in host memory"),
            (elsewhere, "group", "the vae is not in host memory"),
            (tiny_sd(), "modle", "unknown way to offload 'modle': did you mean 'model'"),
        ]
        for pipe, how, said in cases:
            with pytest.raises(UsageError, match=f"^{said}[^\n]*$"):
                dmquant.quantize_pipeline(pipe, "rtn", offload=how, device="cpu")
        by_group = tiny_sd()
        cpu = torch.device("cpu")
        apply_group_offloading(by_group.vae, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        with pytest.raises(
            UsageError, match=r"^the vae has hooks of offloading or casting already: leave it to offload"
        ):
            dmquant.quantize_pipeline(by_group, "rtn", offload="group", device="cpu")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_inference_step": 3}, "unknown argument 'num_inference_step': did you mean 'num_inference_steps'"),
            ({"prompt": "a cat"}, "prompts to calibrate with are its `calibration`"),
            (
                {"generator": torch.Generator()},
                "'generator' is not for .* noise of its own, the same every time",
            ),
            ({"skip_guidance_layers": [1]}, "'skip_guidance_layers' is not for .* leave it out and give it afterwards"),
            ({"kwargs": {}}, "unknown argument 'kwargs'"),
            ({"recipe": LEARNED, "negative_prompt": ["a"] * 3}, "'negative_prompt' has 3 entries: give 1, .* or 4"),
            ({"recipe": LEARNED, "num_images_per_prompt": 0}, "'num_images_per_prompt' is 0: give a whole number"),
            ({"recipe": LEARNED, "prompt_embeds": EMBEDS, "calibration": PROMPTS}, "take the place of prompts"),
            ({"recipe": "rtm"}, "unknown recipe 'rtm': did you mean 'rtn'"),
            ({"recipe": LEARNED, "w": "fp6"}, "this one has its own"),
            ({"recipe": LEARNED, "calibration": "defualt"}, "unknown prompt set 'defualt': did you mean 'default'"),
            ({"recipe": LEARNED, "calibration": []}, "prompts"),
            ({"recipe": LEARNED, "memory_budget": "much"}, "memory_budget 'much' is not a size"),
        ],
    )
    def test_arguments_that_do_not_fit_leave_the_pipeline_as_it_was(self, arguments, message):
        pipe, original = tiny_sd(), tiny_sd()
        prompts = {} if arguments.keys() & {"calibration", "w"} else {"calibration": PROMPTS}
        with pytest.raises(UsageError, match=message) as refused:
            dmquant.quantize_pipeline(pipe, **prompts, **arguments)
        assert "\n" not in str(refused.value)
        assert same_weights(pipe.unet, original.unet)

    def test_a_folder_that_is_in_use(self, tmp_path):
        pipe, original = tiny_sd(), tiny_sd()
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="is in use"):
            dmquant.quantize_pipeline(pipe, "rtn", out=tmp_path)
        assert same_weights(pipe.unet, original.unet)


class TestLora:
    """Adapters that peft holds beside the weights; tests/diffusers/test_quantizer.py has those on a quantized model."""

    @pytest.fixture
    def adapters(self, tmp_path):
        pytest.importorskip("peft")
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        donor = tiny_sd()
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "ff.net.2"], init_lora_weights=False)
        donor.unet.add_adapter(config)
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(donor.unet))
        type(donor).save_lora_weights(tmp_path, unet_lora_layers=state)
        return tmp_path

    @pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused but not unloaded"])
    def test_adapters_in_the_backbone_are_refused_and_left_as_they_were(self, adapters, fuse):
        pipe = tiny_sd()
        pipe.load_lora_weights(adapters)
        if fuse:
            pipe.fuse_lora()
        before = copy.deepcopy(pipe.unet)
        with pytest.raises(UserError, match=r"LoRA adapters: call fuse_lora\(\) and then unload_lora_weights\(\)"):
            dmquant.quantize_pipeline(pipe, "rtn")
        with pytest.raises(UserError, match=r"^layer \S+ holds LoRA adapters: merge or unload them"):
            dmquant.quantize_(pipe.unet, "rtn")
        assert same_weights(pipe.unet, before)

    def test_fused_adapters_are_quantized_like_any_weights(self, adapters):
        pipe, merged = tiny_sd(), tiny_sd()
        pipe.load_lora_weights(adapters)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert not same_weights(pipe.unet, merged.unet)
        merged.unet.load_state_dict(pipe.unet.state_dict())
        for each in (pipe, merged):
            dmquant.quantize_pipeline(each, "rtn")
        assert same_weights(pipe.unet, merged.unet)

    def test_unloaded_adapters_leave_the_plain_weights(self, adapters):
        pipe, plain = tiny_sd(), tiny_sd()
        pipe.load_lora_weights(adapters)
        pipe.unload_lora_weights()
        for each in (pipe, plain):
            dmquant.quantize_pipeline(each, "rtn")
        assert same_weights(pipe.unet, plain.unet)
        pipe.load_lora_weights(adapters)
        assert not torch.allclose(images(pipe), images(plain), atol=1e-4)


class TestControlNet:
    @pytest.fixture
    def pipe(self):
        sd = tiny_sd()
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(sd.unet, conditioning_channels=3, load_weights_from_unet=False)
        net.controlnet_cond_embedding = type(net.controlnet_cond_embedding)(32, 3, block_out_channels=(8, 16))
        net.register_to_config(conditioning_embedding_out_channels=(8, 16))
        with torch.no_grad():  # diffusers starts the outputs of a ControlNet with zeros
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        pipe = StableDiffusionControlNetPipeline(**sd.components, controlnet=net.eval(), requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_a_quantized_unet_runs_with_it_and_the_pipeline_saves_and_loads(self, pipe, tmp_path):
        edges = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
        exact, net = images(pipe, image=edges), copy.deepcopy(pipe.controlnet)
        dmquant.quantize_pipeline(pipe, "w8a8", out=tmp_path / "quantized")
        quantized = images(pipe, image=edges)
        assert same_weights(pipe.controlnet, net)
        assert torch.nn.functional.mse_loss(quantized, exact) < 1e-3
        assert not torch.allclose(images(pipe, image=edges, controlnet_conditioning_scale=0.0), quantized, atol=1e-3)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
        assert type(loaded) is StableDiffusionControlNetPipeline
        assert torch.equal(images(loaded, image=edges), quantized)

    def test_it_calibrates_with_an_image_a_prompt_and_leaves_the_controlnet_alone(self, pipe):
        net, size = copy.deepcopy(pipe.controlnet), (IMAGE_SIZE, IMAGE_SIZE)
        edges = [Image.new("RGB", size, (40 * index, 90, 200)) for index in range(len(PROMPTS))]
        dmquant.quantize_pipeline(pipe, LEARNED, calibration=PROMPTS, image=edges, **CALL)
        assert same_weights(pipe.controlnet, net)
        assert type(pipe) is StableDiffusionControlNetPipeline
        assert images(pipe, image=edges[0]).isfinite().all()

    def test_it_does_not_calibrate_without_images_but_takes_a_unet_calibrated_without_it(self, pipe):
        with pytest.raises(UsageError, match="a StableDiffusionControlNetPipeline takes images: give those"):
            dmquant.quantize_pipeline(pipe, LEARNED, calibration=PROMPTS, **CALL)
        sd = tiny_sd()
        dmquant.quantize_pipeline(sd, LEARNED, calibration=PROMPTS, **CALL)
        pipe.unet = sd.unet
        assert images(pipe, image=torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).isfinite().all()


ATTENTION = {
    "processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "backend": lambda pipe: pipe.unet.set_attention_backend("native"),
}


@pytest.fixture(scope="module")
def plain_attention():
    """Quantized pipelines whose attention nobody has set, by recipe."""
    pipes = {"w4a6": tiny_sd(), LEARNED.name: tiny_sd()}
    for recipe, pipe in zip(("w4a6", LEARNED), pipes.values(), strict=True):
        dmquant.quantize_pipeline(pipe, recipe, calibration=PROMPTS, **CALL)
    return pipes


@pytest.mark.parametrize("setting", ATTENTION)
@pytest.mark.parametrize("recipe", ["w4a6", LEARNED], ids=["data-free", "calibrated"])
def test_attention_can_be_set_before_and_after(setting, recipe, plain_attention):
    """Every implementation computes the same attention but for the order of its sums, which may turn a few codes."""
    before, after = tiny_sd(), copy.deepcopy(plain_attention[getattr(recipe, "name", recipe)])
    plain = images(after)
    ATTENTION[setting](before)
    dmquant.quantize_pipeline(before, recipe, calibration=PROMPTS, **CALL)
    ATTENTION[setting](after)
    assert torch.nn.functional.mse_loss(images(after), plain) < 1e-3  # of a variance of 0.03
    assert torch.nn.functional.mse_loss(images(before), plain) < 1e-3
    if recipe == "w4a6":
        assert same_weights(before.unet, after.unet)


def test_an_attention_backend_that_is_not_installed_is_diffusers_own_error_and_changes_nothing():
    pipe, original = tiny_sd(), tiny_sd()
    with pytest.raises(RuntimeError, match="flash"):
        pipe.unet.set_attention_backend("flash")
    dmquant.quantize_pipeline(pipe, "rtn")
    dmquant.quantize_pipeline(original, "rtn")
    assert torch.equal(images(pipe), images(original))
    with pytest.raises(RuntimeError, match="flash"):
        pipe.unet.set_attention_backend("flash")
    assert images(pipe).isfinite().all()


def test_every_layer_is_quantized_or_kept_by_the_family():
    pipe = tiny_sd()
    made = dmquant.quantize_pipeline(pipe, "w4a6")
    kept = {
        name
        for name, layer in pipe.unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and not isinstance(layer, QuantLinear | QuantConv2d)
    }
    assert kept
    assert all(made.recipe.settings_by_layer([name])[name] is None for name in kept)
    assert json.loads(json.dumps(pipe.unet.config["quantization_config"]["recipe"])) == made.recipe.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a6", FITTED], ids=["data-free", "calibrated"])
def test_both_experts_are_quantized_on_the_timesteps_of_their_own_and_reload_bit_equal(recipe, tmp_path):
    tiny = TINY["wan-22"]
    pipe, call = tiny.build(), {"height": tiny.size, "width": tiny.size, "guidance_scale": 3.0, **tiny.call}
    given = {} if recipe == "w4a6" else {"calibration": tiny.prompts}
    made = dmquant.quantize_pipeline(pipe, recipe, out=tmp_path / "out", num_inference_steps=4, **given, **call)
    names = [layer.plan.name for layer in made.layers]
    assert len(names) == 2 * len(set(names))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for name in ("transformer", "transformer_2"):
        assert same_weights(getattr(loaded, name), getattr(pipe, name))
        assert recorded(getattr(loaded, name))["quant_method"] == "dmquant"
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    videos = [
        each("a boat", num_inference_steps=2, generator=generator, output_type="pt", **call).frames
        for each, generator in zip((pipe, loaded), draw, strict=True)
    ]
    assert torch.equal(*videos)


@pytest.mark.slow
def test_an_expert_may_have_a_recipe_of_its_own():
    tiny = TINY["wan-22"]
    pipe = tiny.build()
    made = dmquant.quantize_pipeline(pipe, "w4a6", components={"transformer_2": "w8a16"})
    assert made.components.keys() == {"transformer_2"}
    assert len(made.layers) == made.components["transformer_2"]["layers"]
    assert recorded(pipe.transformer)["recipe"]["weights"] != recorded(pipe.transformer_2)["recipe"]["weights"]


@pytest.mark.slow
def test_loras_of_two_experts_are_to_be_fused_into_both(tmp_path):
    """By default diffusers fuses them into the first, and unloading drops those of the second."""
    peft = pytest.importorskip("peft")
    pipe = TINY["wan-22"].build(tmp_path / "model")
    pipe.transformer_2.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    both = r"fuse_lora\(components=\['transformer', 'transformer_2'\]\)"
    with pytest.raises(UserError, match=f"the transformer_2 holds LoRA adapters: call {both}"):
        dmquant.quantize_pipeline(pipe, "w4a6")
    spec = resolve_model(str(tmp_path / "model"))
    one = spec.model_copy(update={"loras": (Lora(path=tmp_path / "style.safetensors", scale=1.0),)})
    with pytest.raises(UserError, match="has 2 backbones, and --lora goes into one"):
        load_full_precision(one, torch.float32, "cpu")
