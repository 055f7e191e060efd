"""The arguments of a call for one prompt, in the calls of calibration: the backbone is given what it is given then."""

import copy
import inspect

import diffusers
import pytest
import torch
from PIL import Image

from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sampling
from dmquant.calib.data.tree import flatten
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import families
from dmquant.errors import UsageError, UserError
from tests.calib.runs import call_of, without_padding
from tests.tiny import TINY, TOKENS

SEED, COUNT = 7, 3
LATENTS = torch.randn(COUNT, 4, 16, 16, generator=torch.Generator().manual_seed(1))
EMBEDS = torch.randn(COUNT, TOKENS, 32, generator=torch.Generator().manual_seed(2))
SIZES = {"original_size": (64, 64), "negative_original_size": (8, 8), "negative_target_size": (8, 16)}


def nudging(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * 1.01}


def stopping(pipe, step, timestep, tensors):
    pipe._interrupt = step == 1
    return {}


def with_scheduler(name):
    def change(pipeline):
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)

    return change


def not_distilled(pipeline):
    pipeline.register_to_config(is_distilled=False)


def with_ip_adapter(pipeline):
    """An adapter of four tokens of images of 16 features."""
    unet, draw = pipeline.unet, torch.Generator().manual_seed(0)
    cross = [unet.get_submodule(name[:-10]).to_k for name in unet.attn_processors if "attn2" in name]
    wide = cross[0].in_features
    image = {"proj.weight": (4 * wide, 16), "proj.bias": (4 * wide,), "norm.weight": (wide,), "norm.bias": (wide,)}
    text = {
        f"{2 * index + 1}.to_{kind}_ip.weight": (k.out_features, wide) for index, k in enumerate(cross) for kind in "kv"
    }
    parts = {"image_proj": image, "ip_adapter": text}
    unet._load_ip_adapter_weights(
        [{part: {name: torch.randn(shape, generator=draw) for name, shape in it.items()} for part, it in parts.items()}]
    )


# Model, arguments of the call, what is changed in the pipeline, backbone calls of a call, rows of a sample
CASES = {
    "one negative prompt": ("sd15", {"negative_prompt": "blue boat"}, None, 3, 2),
    "negative prompts": ("sd15", {"negative_prompt": ["red", "blue", "tree"]}, None, 3, 2),
    "no guidance": ("sd15", {"guidance_scale": 1.0, "negative_prompt": "blue"}, None, 3, 1),
    "rescaled guidance": ("sd15", {"guidance_rescale": 0.7, "eta": 0.5}, None, 3, 2),
    "images a prompt": ("sd15", {"num_images_per_prompt": 2}, None, 3, 4),
    "callback": ("sd15", {"callback_on_step_end": nudging}, None, 3, 2),
    "a callback that stops": ("sd15", {"callback_on_step_end": stopping}, None, 2, 2),
    "deprecated callback": ("pixart-sigma", {"callback": lambda *_: None, "callback_steps": 2}, None, 3, 2),
    "latents": ("sd15", {"latents": LATENTS[:1]}, None, 3, 2),
    "latents of each prompt": ("sd15", {"latents": LATENTS}, None, 3, 2),
    "latents of images": ("sd15", {"latents": LATENTS[:2], "num_images_per_prompt": 2}, None, 3, 4),
    "attention": ("sd15", {"cross_attention_kwargs": {"scale": 0.5}}, None, 3, 2),
    "embeddings": ("sd15", {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:1]}, None, 3, 2),
    "negative embeddings": ("sd15", {"negative_prompt_embeds": EMBEDS[:1]}, None, 3, 2),
    "image adapter": ("sd15", {"ip_adapter_image_embeds": [torch.ones(2, 1, 16)]}, with_ip_adapter, 3, 2),
    "timesteps": ("sd15", {"timesteps": [900, 400]}, with_scheduler("LCMScheduler"), 2, 2),
    "sigmas": ("sd15", {"sigmas": [9.0, 0.5, 0.0]}, with_scheduler("EulerDiscreteScheduler"), 2, 2),
    "Heun": ("sd15", {}, with_scheduler("HeunDiscreteScheduler"), 5, 2),
    "KDPM2": ("sd15", {}, with_scheduler("KDPM2DiscreteScheduler"), 5, 2),
    "PNDM": ("sd15", {"num_inference_steps": 5}, with_scheduler("PNDMScheduler"), 14, 2),
    "second prompts": ("sdxl", {"prompt_2": "boat", "negative_prompt_2": "red"}, None, 3, 2),
    "part of a schedule": ("sdxl", {"denoising_end": 0.6, "num_inference_steps": 5}, None, 3, 2),
    "sizes": ("sdxl", SIZES, None, 3, 2),
    "third prompts": ("sd3", {"prompt_2": "boat", "prompt_3": "cat", "negative_prompt_3": "red"}, None, 3, 2),
    "true guidance": ("flux", {"negative_prompt": "red", "true_cfg_scale": 2.0}, None, 6, 1),
    "guidance of klein": ("flux2-klein", {}, not_distilled, 6, 1),
    "negative prompts of Chroma": ("chroma", {"negative_prompt": "red"}, None, 6, 1),
    "negative prompts of Qwen-Image": ("qwenimage", {"negative_prompt": "red boat"}, None, 6, 1),
    "negative prompts of CogView4": ("cogview4", {"negative_prompt": "red boat"}, None, 6, 1),
    "a guider": ("hunyuanimage", {"negative_prompt": "red"}, None, 6, 1),
    "images of Sana": ("sana", {"num_images_per_prompt": 2, "negative_prompt": "red"}, None, 3, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_backbone_is_given_what_a_call_for_one_prompt_gives_it(name, tmp_path):
    model, arguments, change, steps, rows = CASES[name]
    tiny, family = TINY[model], families()[TINY[model].family]
    pipeline = tiny.build()
    if change is not None:
        change(pipeline)
    call = call_of(model, 3) | arguments
    if arguments.keys() & {"timesteps", "sigmas"}:
        del call["num_inference_steps"]
    calls = Calls(None if "prompt_embeds" in call else tiny.prompts[:COUNT], SEED, call)
    store = capture(
        pipeline,
        family.component,
        calls,
        sampling=Sampling("uniform", 99, 0.3),
        batch_size=2,
        folder=tmp_path,
        made_for={},
        **family.batching,
    )
    assert (store.steps, store.rows) == (steps, rows)
    for prompt in range(COUNT):
        given = arguments_of(pipeline, family.component, calls, prompt)
        for index, sample in enumerate(store.samples):
            if sample.prompt == prompt:
                both = (store.batch([index])[1], given[sample.step])
                stored, passed = (flatten(without_padding(family, each)) for each in both)
                assert stored[0] == passed[0]
                for (leaf, one), (_, other) in zip(stored[1], passed[1], strict=True):
                    assert torch.allclose(one, other.expand_as(one), atol=1e-4), leaf


def arguments_of(pipeline, component, calls, prompt):
    """What the backbone is given in a call for one prompt, as somebody makes it."""
    one = dict(calls.arguments)
    for name, count in (("latents", calls.images), ("prompt_embeds", 1)):
        if name in one and len(one[name]) == count * COUNT:
            one[name] = one[name][prompt * count : (prompt + 1) * count]
    if isinstance(one.get("negative_prompt"), list):
        one["negative_prompt"] = one["negative_prompt"][prompt]
    if calls.prompts is not None:
        one["prompt"] = calls.prompts[prompt]
    noise = [torch.Generator().manual_seed(SEED + prompt * calls.images + image) for image in range(calls.images)]
    backbone, given = getattr(pipeline, component), []
    signature = inspect.signature(backbone.forward)

    def keep(module, args, kwargs):
        given.append(copy.deepcopy(dict(signature.bind(*args, **kwargs).arguments)))

    handle = backbone.register_forward_pre_hook(keep, with_kwargs=True)
    pipeline(**one, generator=noise if calls.images > 1 else noise[0], output_type="latent")
    handle.remove()
    return given


def test_plain_arguments_share_a_call_and_others_do_not():
    together = {"negative_prompt": "blue", "num_inference_steps": 3, "sigmas": [1.0, 0.5], "prompt_embeds": None}
    assert not Calls(["a", "b"], 0, together).one_by_one
    for apart in ({"num_images_per_prompt": 2}, {"latents": LATENTS[:1]}, {"callback": print}, {"timesteps": LATENTS}):
        assert Calls(["a", "b"], 0, apart).one_by_one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": LATENTS}, "'latents' has 3 entries: give 1, the same for every prompt, or 2, for the 2 prompts"),
        (
            {"latents": LATENTS, "num_images_per_prompt": 2},
            "'latents' has 3 entries: give 2, .* or 4, for the 2 prompts",
        ),
        ({"negative_prompt": ["a", "b", "c"]}, "'negative_prompt' has 3 entries: give 1"),
        ({"pooled_prompt_embeds": EMBEDS}, "'pooled_prompt_embeds' has 3 entries: give 1"),
        ({"num_images_per_prompt": 0}, "'num_images_per_prompt' is 0: give a whole number from 1"),
        ({"num_images_per_prompt": "two"}, "'num_images_per_prompt' is 'two': give a whole number from 1"),
    ],
)
def test_entries_for_neither_one_prompt_nor_all_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message) as refused:
        Calls(["a", "b"], 0, arguments)
    assert "\n" not in str(refused.value)


class Seen:
    """A pipeline that keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def set_progress_bar_config(self, **config): ...

    def __call__(self, prompt, generator, output_type, **given):
        self.calls.append(given)
        return type("Output", (), {"images": torch.zeros(len(prompt))})


class Closed:
    """An image that is not in memory."""

    def __init__(self, image):
        self.image, self.sha256, self.times = image, "digest", 0

    def opened(self):
        self.times += 1
        return self.image


class TestImages:
    PICTURES = tuple(Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(3))

    def given(self, value, batch, prompts=("a", "b", "c")):
        seen = Seen()
        Calls(list(prompts), 0, {"image": value}).latents(seen, batch)
        return seen.calls[0]["image"]

    def test_each_prompt_of_a_batch_is_given_its_own(self):
        assert self.given(self.PICTURES, range(1, 3)) == [*self.PICTURES[1:]]
        assert self.given(self.PICTURES, range(2, 3)) is self.PICTURES[2]

    def test_one_goes_with_every_prompt(self):
        for value in (self.PICTURES[0], self.PICTURES[:1]):
            assert self.given(value, range(3)) == [self.PICTURES[0]] * 3
            assert self.given(value, range(1)) is self.PICTURES[0]

    def test_a_prompt_may_have_several(self):
        pairs = [self.PICTURES[:2], self.PICTURES[1:], self.PICTURES[::2]]
        assert self.given(pairs, range(1, 2)) == [*self.PICTURES[1:]]
        assert Calls(["a", "b", "c"], 0, {"image": pairs}).one_by_one

    def test_they_are_opened_for_the_batch_they_are_in(self):
        closed = [Closed(picture) for picture in self.PICTURES]
        assert self.given(closed, range(1)) is self.PICTURES[0]
        assert [each.times for each in closed] == [1, 0, 0]

    def test_they_share_a_call_with_others(self):
        for together in (self.PICTURES, self.PICTURES[0], [Closed(picture) for picture in self.PICTURES], None):
            assert not Calls(["a", "b", "c"], 0, {"image": together, "strength": 0.5}).one_by_one
        for apart in (torch.zeros(3, 3, 8, 8), self.PICTURES[0].tobytes()):
            assert Calls(["a", "b", "c"], 0, {"image": apart}).one_by_one
        assert Calls(["a"], 0, {"image": self.PICTURES[0], "num_images_per_prompt": 2}).one_by_one

    def test_those_of_some_prompts_stay_with_them(self):
        calls = Calls(["a", "b", "c"], 0, {"image": self.PICTURES, "mask_image": self.PICTURES[0]})
        some = calls.only([2, 0])
        assert some.arguments["image"] == [self.PICTURES[2], self.PICTURES[0]]
        assert some.arguments["mask_image"] is self.PICTURES[0]

    def test_neither_one_nor_one_for_each_prompt_is_refused(self):
        with pytest.raises(UsageError, match=r"'control_image' has 2 entries: give 1, .* or 3, for the 3 prompts"):
            Calls(["a", "b", "c"], 0, {"control_image": self.PICTURES[:2]})

    def test_they_are_described_by_their_pixels(self):
        def described(image):
            return Calls(["a"], 0, {"image": image}).dependencies()["image"]

        assert described(self.PICTURES[0]) == described(self.PICTURES[0].copy()) != described(self.PICTURES[1])
        assert described([Closed(self.PICTURES[0])]) == ["digest"]


def test_some_of_the_prompts_keep_their_own_entries():
    calls = Calls(["a", "b", "c"], 0, {"negative_prompt": ["x", "y", "z"], "latents": LATENTS, "prompt_2": "w"})
    some = calls.only([2, 0])
    assert some.prompts == ["c", "a"]
    assert some.arguments["negative_prompt"] == ["z", "x"]
    assert torch.equal(some.arguments["latents"], LATENTS[[2, 0]])
    assert some.arguments["prompt_2"] == "w"


def test_arguments_are_described_by_their_content_and_those_without_any_never_alike():
    def described(**arguments):
        return Calls(["a"], 0, arguments).dependencies()

    assert described(latents=LATENTS[:1], size=(1, 2)) == described(latents=LATENTS[:1].clone(), size=[1, 2])
    assert described(latents=LATENTS[:1]) != described(latents=LATENTS[1:2])
    assert described(image=LATENTS.numpy()) == described(image=LATENTS.numpy().copy()) != described(image=LATENTS)
    assert described(callback=nudging) != described(callback=nudging)
    assert described(kwargs={"scale": 1.0}) != described(kwargs={"scale": 2.0})


def test_a_call_cannot_change_what_the_next_one_is_given():
    class Pipeline:
        def set_progress_bar_config(self, **config): ...

        def __call__(self, prompt, generator, output_type, latents, kwargs):
            kwargs["scale"].zero_()
            kwargs["more"] = 1
            return type("Output", (), {"images": latents.add_(1)})

    calls = Calls(["a", "b"], 0, {"latents": torch.ones(1), "kwargs": {"scale": torch.ones(1)}})
    assert [calls.latents(Pipeline(), range(index, index + 1)).item() for index in range(2)] == [2, 2]
    assert calls.arguments["kwargs"] == {"scale": torch.ones(1)}


class TestRefusals:
    def captured(self, model, tmp_path, call, change=lambda pipeline: None):
        tiny, family = TINY[model], families()[TINY[model].family]
        pipeline, sampling = tiny.build(), Sampling("uniform", 2, 0.3)
        change(pipeline)
        calls = Calls(tiny.prompts[:COUNT], SEED, call_of(model, 3) | call)
        with pytest.raises(UserError) as refused:
            capture(
                pipeline, family.component, calls, sampling=sampling, batch_size=2, folder=tmp_path / "d", made_for={}
            )
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 500
        assert not (tmp_path / "d").exists()
        return str(refused.value)

    def test_a_callback_that_ends_guidance(self, tmp_path):
        def end(pipe, step, timestep, tensors):
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

        call = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        assert "1 rows for 1 prompts at step 1, and 2 rows each before" in self.captured("sd15", tmp_path, call)

    @pytest.mark.parametrize(
        "call", [{"height": 13}, {"negative_prompt_embeds": EMBEDS[:1], "negative_prompt": "red"}, {"eta": object()}]
    )
    def test_what_the_pipeline_itself_refuses(self, tmp_path, call):
        message = self.captured("sd15", tmp_path, call)
        assert message.startswith("the StableDiffusionPipeline cannot be called with ")
        assert list(call)[-1] in message

    @pytest.mark.parametrize(
        ("model", "part"), [("sd15", "text_encoder"), ("flux", "tokenizer_2"), ("sdxl", "scheduler")]
    )
    def test_a_pipeline_without_a_part(self, tmp_path, model, part):
        message = self.captured(model, tmp_path, {}, lambda pipeline: pipeline.register_modules(**{part: None}))
        assert f" has no {part}, so it " in message
        assert "add what is missing" in message


def test_a_text_encoder_that_a_pipeline_can_do_without_is_not_missed():
    tiny = TINY["sd3"]
    pipeline = tiny.build()
    pipeline.register_modules(text_encoder_3=None)
    assert Calls(["a red cat"], 0, call_of("sd3", 2)).latents(pipeline, range(1)).isfinite().all()
