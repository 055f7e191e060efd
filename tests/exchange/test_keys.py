"""Original names of weights: diffusers' own converters, which read them, give the model back."""

import pytest
import torch

from dmquant.exchange.keys import original
from tests.tiny import TINY

CONVERTERS = {
    "sd15": "convert_ldm_unet_checkpoint",
    "sdxl": "convert_ldm_unet_checkpoint",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
}
FLUX_WIDTH = 3072  # of the only Flux that diffusers' converter cuts into layers


def exported(backbone, state):
    targets = original(type(backbone).__name__, backbone.config, state)
    return {target.name: target.rows([state[source] for source in target.sources]) for target in targets}


def numbered(state, width):
    """Tensors of the same rows for a model of another width, one column each, so that each row is told apart."""
    narrow = state["norm_out.linear.weight"].shape[1]
    rows = {name: len(tensor) * (1 if len(tensor) % narrow else width // narrow) for name, tensor in state.items()}
    return {name: torch.rand(count, 1) for name, count in rows.items()}


@pytest.mark.parametrize("name", CONVERTERS)
def test_the_converters_of_diffusers_give_every_tensor_back(name):
    from diffusers.loaders import single_file_utils

    pipeline = TINY[name].build()
    backbone = getattr(pipeline, "unet", None) or pipeline.transformer
    state = backbone.state_dict()
    if name == "flux":
        state = numbered(state, FLUX_WIDTH)
    convert = getattr(single_file_utils, CONVERTERS[name])
    back = convert(checkpoint=exported(backbone, state), config=backbone.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[each], state[each]) for each in state)


def test_a_backbone_without_an_original_layout_or_with_unknown_parts_has_none():
    config = TINY["sd15"].build().unet.config
    assert original("PixArtTransformer2DModel", {}, ["proj_out.weight"]) is None
    assert original("UNet2DConditionModel", config, ["conv_in.weight", "encoder_hid_proj.weight"]) is None
