"""Every backbone at its published size, on the meta device, and what its forward is given for two rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import BACKBONES
from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

import diffusers

ROWS = 2
LATENT = 16
"""Height and width of the latents of a call: structure does not depend on it."""


@dataclass(frozen=True)
class Architecture:
    """A published backbone: family, class, configuration, parameters, and the arguments of one call."""

    family: str
    kind: str
    config: dict[str, Any]
    parameters: int
    inputs: Callable[[], dict[str, Any]]

    def build(self) -> nn.Module:
        """The backbone without memory for its weights, in eval mode."""
        with torch.device("meta"):
            return getattr(diffusers, self.kind)(**self.config).eval()

    def call(self, backbone: nn.Module) -> None:
        """Run the backbone once; only shapes are computed."""
        with torch.device("meta"), torch.no_grad():
            backbone(**self.inputs())


def _rows(*shape: int) -> Tensor:
    return torch.ones(ROWS, *shape)


def _latents(channels: int) -> Tensor:
    return _rows(channels, LATENT, LATENT)


def _unet(text: int, **added: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "sample": _latents(4),
        "timestep": torch.ones(()),
        "encoder_hidden_states": _rows(77, text),
        **{name: make() for name, make in added.items()},
    }


def _pixart() -> dict[str, Any]:
    return {
        "hidden_states": _latents(4),
        "encoder_hidden_states": _rows(20, 4096),
        "encoder_attention_mask": _rows(20),
        "timestep": _rows(),
        "added_cond_kwargs": {"resolution": _rows(2), "aspect_ratio": _rows(1)},
    }


def _hunyuan() -> dict[str, Any]:
    rotary = torch.ones((LATENT // 2) ** 2, 88)
    return {
        "hidden_states": _latents(4),
        "timestep": _rows(),
        "encoder_hidden_states": _rows(77, 1024),
        "text_embedding_mask": _rows(77),
        "encoder_hidden_states_t5": _rows(256, 2048),
        "text_embedding_mask_t5": _rows(256),
        "image_meta_size": _rows(6),
        "style": _rows().long(),
        "image_rotary_emb": (rotary, rotary),
    }


def _sd3() -> dict[str, Any]:
    return {
        "hidden_states": _latents(16),
        "encoder_hidden_states": _rows(20, 4096),
        "pooled_projections": _rows(2048),
        "timestep": _rows(),
    }


def _flux() -> dict[str, Any]:
    tokens = (LATENT // 2) ** 2
    return {
        "hidden_states": _rows(tokens, 64),
        "encoder_hidden_states": _rows(20, 4096),
        "pooled_projections": _rows(768),
        "timestep": _rows(),
        "img_ids": torch.ones(tokens, 3),
        "txt_ids": torch.ones(20, 3),
    }


def _chroma() -> dict[str, Any]:
    return {name: value for name, value in _flux().items() if name != "pooled_projections"}


def _hunyuanimage() -> dict[str, Any]:
    """Without quoted text, whose tokens the transformer picks by their values."""
    return {
        "hidden_states": _latents(64),
        "timestep": _rows(),
        "encoder_hidden_states": _rows(20, 3584),
        "encoder_attention_mask": _rows(20),
    }


def _qwenimage() -> dict[str, Any]:
    side = LATENT // 2
    return {
        "hidden_states": _rows(side**2, 64),
        "encoder_hidden_states": _rows(20, 3584),
        "timestep": _rows(),
        "img_shapes": [[(1, side, side)]] * ROWS,
    }


def _cogview4() -> dict[str, Any]:
    return {
        "hidden_states": _latents(16),
        "encoder_hidden_states": _rows(32, 4096),
        "timestep": _rows(),
        **{name: _rows(2) for name in ("original_size", "target_size", "crop_coords")},
    }


def _auraflow() -> dict[str, Any]:
    return {"hidden_states": _latents(4), "encoder_hidden_states": _rows(20, 2048), "timestep": _rows()}


def _wan(channels: int, **timestep: Tensor) -> dict[str, Any]:
    """Three latent frames."""
    return {
        "hidden_states": _rows(channels, 3, LATENT, LATENT),
        "timestep": _rows(),
        "encoder_hidden_states": _rows(20, 4096),
        **timestep,
    }


def _flux2(text: int, **guidance: Tensor) -> dict[str, Any]:
    """For text embeddings of that many channels; each row has positions of its own, which are those of the first."""
    tokens = (LATENT // 2) ** 2
    return {
        "hidden_states": _rows(tokens, 128),
        "encoder_hidden_states": _rows(20, text),
        "timestep": _rows(),
        "img_ids": _rows(tokens, 4),
        "txt_ids": _rows(20, 4),
        **guidance,
    }


def _sana() -> dict[str, Any]:
    return {
        "hidden_states": _latents(32),
        "encoder_hidden_states": _rows(20, 2304),
        "timestep": _rows(),
        "encoder_attention_mask": _rows(20),
    }


def _dit() -> dict[str, Any]:
    return {"hidden_states": _latents(4), "timestep": _rows(), "class_labels": _rows().long()}


_TEXT_TIME = {"added_cond_kwargs": lambda: {"text_embeds": _rows(1280), "time_ids": _rows(6)}}
_BENCHMARKED = {
    "sd15": ("UNet2DConditionModel", _unet(768)),
    "sdxl": ("UNet2DConditionModel", _unet(2048, **_TEXT_TIME)),
    "pixart-alpha": ("PixArtTransformer2DModel", _pixart),
    "pixart-sigma": ("PixArtTransformer2DModel", _pixart),
    "hunyuan-1.1": ("HunyuanDiT2DModel", _hunyuan),
    "hunyuan": ("HunyuanDiT2DModel", _hunyuan),
}
_SD3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
_FLUX2 = "Flux2Transformer2DModel"
_KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
_COGVIEW4 = {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}
_WAN_13B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_WAN_5B = {
    "num_layers": 30,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
_DIT = {"sample_size": 32, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
ARCHITECTURES = {
    name: Architecture(BACKBONES[name].family, kind, BACKBONES[name].config, BACKBONES[name].parameters, inputs)
    for name, (kind, inputs) in _BENCHMARKED.items()
} | {
    "sd3": Architecture("sd3", "SD3Transformer2DModel", _SD3, 2_028_328_000, _sd3),
    "sd35-medium": Architecture("sd3", "SD3Transformer2DModel", _SD3 | _SD35_MEDIUM, 2_243_171_520, _sd3),
    "flux-dev": Architecture(
        "flux",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        11_901_408_320,
        lambda: _flux() | {"guidance": _rows()},
    ),
    "flux-schnell": Architecture("flux", "FluxTransformer2DModel", {}, 11_891_178_560, _flux),
    "chroma": Architecture("chroma", "ChromaTransformer2DModel", {}, 8_899_983_424, _chroma),
    "flux2-dev": Architecture("flux2", _FLUX2, {}, 32_223_281_152, lambda: _flux2(15360, guidance=_rows())),
    "flux2-klein-4b": Architecture("flux2", _FLUX2, _KLEIN_4B, 3_875_544_576, lambda: _flux2(7680)),
    "flux2-klein-9b": Architecture("flux2", _FLUX2, _KLEIN_9B, 9_078_581_248, lambda: _flux2(12288)),
    "hunyuanimage": Architecture(
        "hunyuanimage", "HunyuanImageTransformer2DModel", {"text_embed_2_dim": 1472}, 17_425_795_520, _hunyuanimage
    ),
    "qwenimage": Architecture("qwenimage", "QwenImageTransformer2DModel", {}, 20_430_401_088, _qwenimage),
    "cogview4": Architecture("cogview4", "CogView4Transformer2DModel", _COGVIEW4, 6_369_118_272, _cogview4),
    "auraflow": Architecture("auraflow", "AuraFlowTransformer2DModel", {}, 6_833_439_744, _auraflow),
    "sana": Architecture("sana", "SanaTransformer2DModel", {}, 1_604_462_752, _sana),
    "wan2.1-1.3b": Architecture("wan", "WanTransformer3DModel", _WAN_13B, 1_418_996_800, lambda: _wan(16)),
    "wan2.1-14b": Architecture("wan", "WanTransformer3DModel", {}, 14_288_491_584, lambda: _wan(16)),
    "wan2.2-5b": Architecture(
        "wan",
        "WanTransformer3DModel",
        _WAN_5B,
        4_999_787_712,
        lambda: _wan(48, timestep=_rows(3 * (LATENT // 2) ** 2)),
    ),
    "dit-256": Architecture("dit", "DiTTransformer2DModel", _DIT, 749_826_464, _dit),
}
"""By the name of the preset. The counts of those that are not benchmarked are those of the classes at the published
configurations; the published figures are 2, 2.5 (SD 3.5, with the table of positions), 12, 12, 8.9 (Chroma), 32, 4, 9,
17 (HunyuanImage), 20 (Qwen-Image), 6 (CogView4), 6.8 (AuraFlow, with the class's own table of positions), 1.6, 1.3
(Wan), 14, 5 and 0.675 billion (DiT, with one copy of the embedder that all 28 blocks have in diffusers)."""
