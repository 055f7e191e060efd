"""LoRAs fused into a pipeline before quantizing: what is taken, what is refused, and that they are in the weights."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmquant  # noqa: F401  (before diffusers, for which it makes torchvision importable)
from dmquant.errors import UsageError, UserError
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.loras import parse
from dmquant.pipelines.models.registry import resolve_model, with_loras
from dmquant.pipelines.runs.model_stage import model_card

peft = pytest.importorskip("peft")
CONFIG = {"r": 2, "target_modules": ["to_q", "to_out.0"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def of_unet(tmp_path_factory):
    """A LoRA for emoji-sd as diffusers saves it, with its licence in a README."""
    folder, unet = tmp_path_factory.mktemp("style"), load("emoji-sd").unet
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(**CONFIG))
    state = {f"unet.{name}": tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(unet).items()}
    save_file(state, folder / "style.safetensors")
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return folder / "style.safetensors"


def load(name, *loras):
    return load_full_precision(with_loras(resolve_model(name), loras), torch.float32, "cpu", lambda line: None)


def test_a_lora_is_in_the_weights_by_its_scale_and_nothing_else_is_left(of_unet):
    plain, baked = load("emoji-sd").unet.state_dict(), load("emoji-sd", f"{of_unet}:0.5").unet.state_dict()
    assert plain.keys() == baked.keys()
    layer, state = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", load_file(of_unet)
    down, up = (state[f"unet.{layer}.lora_{which}.weight"] for which in "AB")
    alpha_over_rank = 8 / 2 if not any(name.endswith(".alpha") for name in state) else 1
    added = baked[f"{layer}.weight"] - plain[f"{layer}.weight"]
    factor = (added * (up @ down)).sum() / (up @ down).square().sum()
    assert torch.allclose(added, factor * (up @ down), atol=1e-5)
    assert factor.item() in (pytest.approx(0.5, rel=1e-3), pytest.approx(0.5 * alpha_over_rank, rel=1e-3))
    changed = {name for name in plain if not torch.equal(plain[name], baked[name])}
    assert changed == {name.removeprefix("unet.").replace("lora_A.", "") for name in state if "lora_A" in name}


def test_the_folder_of_an_adapter_of_peft_goes_into_a_backbone_without_loaders(tmp_path):
    pipe = load("emoji-pixart")
    plain = copy.deepcopy(pipe.transformer.state_dict())
    torch.manual_seed(0)
    adapted = peft.get_peft_model(pipe.transformer, peft.LoraConfig(**CONFIG))
    adapted.save_pretrained(tmp_path / "mine")
    expected = adapted.merge_and_unload().state_dict()
    baked = load("emoji-pixart", str(tmp_path / "mine")).transformer.state_dict()
    assert baked.keys() == plain.keys()
    assert all(torch.allclose(baked[name], expected[name], atol=1e-6) for name in plain)
    assert any(not torch.equal(baked[name], plain[name]) for name in plain)


def test_a_card_names_license_scale_and_hash(of_unet):
    lora = parse(f"{of_unet}:0.25")
    card = model_card("emoji", "rtn", "fp4", "fp6", "StableDiffusionPipeline", torch.float32, [lora.describe()])
    assert f"style at 0.25 (license: cc-by-4.0; SHA-256 {lora.sha256})" in card
    assert with_loras(resolve_model("emoji-sd"), [str(of_unet)]).name == "emoji-sd+style"


def test_what_is_no_lora_or_does_not_fit_is_refused_in_one_line(of_unet, tmp_path):
    state = load_file(of_unet)
    first = next(name for name in state if "lora_A" in name)
    other, plain = tmp_path / "other.safetensors", tmp_path / "plain.safetensors"
    save_file({name: tensor[:, :-1].contiguous() if name == first else tensor for name, tensor in state.items()}, other)
    save_file({"weight": torch.ones(2, 2)}, plain)
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"")
    for error, given, said in (
        (UsageError, f"{of_unet}:much", "the scale 'much' is no number"),
        (UserError, str(tmp_path / "nowhere.safetensors"), "there is no "),
        (UserError, str(pickle), "is a pickle"),
        (UserError, str(plain), "is no LoRA: its first tensor is weight"),
    ):
        with pytest.raises(error, match=said):
            parse(given)
    with pytest.raises(UserError, match=r"does not fit this StableDiffusionPipeline: .*to_(q|out).*"):
        load("emoji-sd", str(other))
    with pytest.raises(UserError, match=r"^diffusers loads no LoRA file into a PixArtSigmaPipeline"):
        load("emoji-pixart", str(of_unet))
