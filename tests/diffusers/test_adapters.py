"""LoRA adapters of every kind load onto quantized backbones, and nothing that is saved changes by them."""

import copy
import io
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.convert import quantize_
from dmquant.diffusers import registering
from dmquant.diffusers.dequantize import dequantize_
from dmquant.errors import UserError
from dmquant.layers import QuantLinear, quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from tests.tiny import TINY, marked

from diffusers import FluxControlPipeline  # isort: skip
from transformers import T5Config, T5EncoderModel  # isort: skip

peft = pytest.importorskip("peft")
FP8 = Recipe.load("rtn", "fp8", "none")
JOINT = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.ff.net.2")
RECENT = ("flux2", "flux2-klein", "chroma", "hunyuanimage", "qwenimage", "cogview4", "auraflow", "wan", "wan-22")
SINGLE = ("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.1.attn.to_v")


@pytest.fixture(scope="module")
def tiny_flux():
    return TINY["flux"].build()


@pytest.fixture(params=["family", "none"])
def flux(tiny_flux, request):
    """A quantized Flux; by `none` even the layers at its ends are."""
    pipe = copy.deepcopy(tiny_flux)
    quantize_(pipe.transformer, FP8.with_settings(keep=request.param))
    return pipe


def lora(transformer, layers, seed=1, rank=2, **widths):
    """A LoRA for some layers, by name, as a file of it has the tensors; `widths` are other numbers of inputs."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in layers:
        layer = transformer.get_submodule(name)
        width = widths.get(name, layer.in_features)
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator)
    return found


@torch.no_grad()
def output(transformer):
    generator, width = torch.Generator().manual_seed(0), transformer.config.in_channels
    text = transformer.config.joint_attention_dim
    return transformer(
        hidden_states=torch.randn(1, 4, width, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, text, generator=generator),
        pooled_projections=torch.randn(1, transformer.config.pooled_projection_dim, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def test_loras_load_onto_flux_one_after_another_and_leave_no_trace(flux, tmp_path):
    model = flux.transformer
    plain, names = output(model), list(model.state_dict())
    flux.load_lora_weights(lora(model, (*JOINT, *SINGLE)), adapter_name="one")
    one = output(model)
    flux.load_lora_weights(lora(model, JOINT[:2], seed=2), adapter_name="two")
    flux.set_adapters(["one", "two"])
    two = output(model)
    assert not torch.allclose(one, plain, atol=1e-3)
    assert not torch.allclose(two, one, atol=1e-3)
    with pytest.raises(UserError, match=r"^the folder would not load: \S+base_layer\S+ is new since.*unload_lora_weig"):
        model.save_pretrained(tmp_path)
    flux.unload_lora_weights()
    assert torch.equal(output(model), plain)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert list(type(model).from_pretrained(tmp_path).state_dict()) == names


def test_a_lora_adds_to_flux_what_it_adds_to_the_decoded_weights(flux):
    decoded = copy.deepcopy(flux)
    decoded.transformer.dequantize()
    for pipe in (flux, decoded):
        pipe.load_lora_weights(lora(pipe.transformer, (*JOINT, *SINGLE)))
    assert torch.allclose(output(flux.transformer), output(decoded.transformer), atol=1e-4)


def test_a_lora_in_the_format_of_kohya_loads(flux):
    plain = output(flux.transformer)
    generator = torch.Generator().manual_seed(0)
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    width = flux.transformer.inner_dim
    state = {
        f"{layer}.lora_down.weight": torch.randn(2, width, generator=generator),
        f"{layer}.lora_up.weight": torch.randn(width, 2, generator=generator),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    flux.load_lora_weights(state)
    assert not torch.allclose(output(flux.transformer), plain, atol=1e-3)


def test_a_control_lora_widens_the_embedder_and_can_be_taken_off(flux, tmp_path):
    parts = {name: part for name, part in flux.components.items() if "image" not in name and "feature" not in name}
    pipe, model = FluxControlPipeline(**parts), flux.transformer
    plain, width, kept = output(model), model.config.in_channels, not isinstance(model.x_embedder, QuantLinear)
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.full((model.config.attention_head_dim,), 2.0)}
    pipe.load_lora_weights(lora(model, ("x_embedder", *JOINT), x_embedder=2 * width) | norm)
    assert model.config.in_channels == 2 * width
    assert output(model).isfinite().all()
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    assert model.config.in_channels == width
    assert torch.allclose(output(model), plain, atol=1e-5)
    if kept:
        model.save_pretrained(tmp_path)
        assert torch.allclose(output(type(model).from_pretrained(tmp_path)), plain, atol=1e-5)
    else:  # diffusers left a float layer in its place
        with pytest.raises(UserError, match=r"^the folder would not load: x_embedder.qweight is gone"):
            model.save_pretrained(tmp_path)


def test_a_state_answers_to_weights_that_it_does_not_hold(flux):
    model, name = flux.transformer, JOINT[0]
    state = model.state_dict()
    assert f"{name}.weight" in state
    assert f"{name}.weight" not in list(state)
    assert state[f"{name}.weight"].shape == model.get_submodule(name).weight.shape
    with pytest.raises(KeyError, match="nowhere"):
        state["nowhere.weight"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for plain in (torch.load(file, weights_only=True), copy.deepcopy(state)):
        assert type(plain) is OrderedDict
        assert plain.keys() == state.keys()
        assert f"{name}.weight" not in plain
    model.load_state_dict(state, strict=True)
    within = nn.ModuleDict({"model": model}).state_dict()
    assert [f"model.{key}" for key in state] == list(within)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "sana", "pixart-sigma", "hunyuan-1.2", "dit", *marked(RECENT)])
def test_adapters_of_every_family_are_added_loaded_fused_and_taken_off(kind):
    pipeline = TINY[kind].build()
    backbone = getattr(pipeline, "unet", None) or pipeline.transformer
    quantize_(backbone, "w4a6")
    before = backbone.state_dict()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    if not hasattr(backbone, "add_adapter"):  # PixArt and others have no LoRA loaders in diffusers
        assert any("lora_A" in name for name in peft.get_peft_model(backbone, config).state_dict())
        return
    backbone.add_adapter(config)
    assert any("lora_A" in name for name in backbone.state_dict())
    if not hasattr(pipeline, "load_lora_weights"):  # nor has HunyuanImage's pipeline
        return
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    state = peft.utils.get_peft_model_state_dict(backbone)
    backbone.unload_lora()
    pipeline.load_lora_weights({f"{component}.{name}": tensor for name, tensor in state.items()})
    loaded = peft.utils.get_peft_model_state_dict(backbone, adapter_name="default_0")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    pipeline.fuse_lora(requantize=True)
    assert pipeline.num_fused_loras == 1
    pipeline.unfuse_lora(components=[component])  # by default AuraFlow's looks for a text encoder that it cannot fuse
    pipeline.unload_lora_weights()
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        spec = WeightSpec.parse("fp8")
        self.to_q = quantize_layer(nn.Linear(32, 32), spec, None)
        self.conv = quantize_layer(nn.Conv2d(8, 8, 3, padding=1), spec, None)

    def forward(self, x, y):
        return self.to_q(x), self.conv(y)


BOTH = {"target_modules": ["to_q", "conv"]}
KINDS = {
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **BOTH),
    "LoHa": lambda: peft.LoHaConfig(r=2, init_weights=False, **BOTH),
    "LoKr": lambda: peft.LoKrConfig(r=2, init_weights=False, **BOTH),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **BOTH),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["to_q"], init_weights=False),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
@torch.no_grad()
def test_other_adapters_do_on_codes_what_they_do_on_decoded_weights(config):
    x, outputs = (torch.randn(3, 32), torch.randn(1, 8, 5, 5)), []
    for decode in (False, True):
        base = Layers()
        if decode:
            dequantize_(base)
        torch.manual_seed(2)
        adapted = peft.get_peft_model(base, config())
        with adapted.disable_adapter():
            plain = adapted(*x)
        outputs.append((*adapted(*x), *plain))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*outputs, strict=True))
    assert not torch.allclose(outputs[0][0], outputs[0][2], atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_start_by_changing_the_weight_are_refused(init):
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=init)
    with pytest.raises(RuntimeError, match=r"^a quantized layer's weight cannot be written to"):
        peft.get_peft_model(Layers(), config)


def test_a_text_encoder_with_an_adapter_on_a_layer_whose_dtype_it_reads():
    """T5 casts what goes into `wo` to the dtype of the weight of that layer, which peft's wrapper answers for."""
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
    quantize_(encoder, Recipe.load("rtn", "fp8", "none"))
    with torch.no_grad():
        plain = encoder(torch.arange(10)[None]).last_hidden_state
        encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["wo", "q"]))
        adapted = encoder(torch.arange(10)[None]).last_hidden_state
    wrapped = encoder.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wrapped.base_layer, QuantLinear)
    assert wrapped.weight.dtype == torch.float32
    assert torch.equal(adapted, plain)  # a new adapter adds nothing


def test_peft_imported_first_knows_quantized_layers_too(monkeypatch):
    wrapper = peft.tuners.tuners_utils.BaseTunerLayer
    others = [finder for finder in sys.meta_path if not isinstance(finder, registering._Finder)]
    adapted = peft.get_peft_model(Layers(), peft.LoraConfig(target_modules=["to_q"])).base_model.model.to_q
    monkeypatch.setattr(wrapper, "weight", property(lambda layer: layer.get_base_layer().qweight))  # as it comes
    monkeypatch.setattr(sys, "meta_path", others)
    assert adapted.weight.dtype == torch.uint8
    registering.install()
    assert adapted.weight.dtype == torch.float32


def test_the_public_door_quantizes_a_pipeline_that_takes_loras(tiny_flux):
    pipe = copy.deepcopy(tiny_flux)
    dmquant.quantize_pipeline(pipe, "w4a6")
    pipe.load_lora_weights(lora(pipe.transformer, JOINT))
    adapted = pipe.transformer.get_submodule(JOINT[0])
    assert adapted.lora_A["default_0"].weight.dtype == pipe.transformer.dtype
