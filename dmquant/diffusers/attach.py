"""What a diffusers model needs besides quantized layers: a record of them, its timesteps, methods that know of them."""

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from dmquant.diffusers.methods import allow_fusing, extend, refuse_fusing
from dmquant.diffusers.state import answer_to_weights, forget_weights
from dmquant.diffusers.timesteps import forget_timesteps, tell_timesteps
from dmquant.models import refuse_to_save


def attach(model: nn.Module, quantizer: DiffusersQuantizer) -> None:
    """Tell a diffusers model that it is quantized: it is saved as such, cast, counted, and told its timesteps."""
    from diffusers import ModelMixin  # which imports the quantizers

    extend(ModelMixin, type(quantizer))
    tell_timesteps(model)
    answer_to_weights(model)
    refuse_fusing(model)
    config = quantizer.quantization_config
    model.register_to_config(quantization_config=config.to_dict())
    model.hf_quantizer, model.is_quantized = quantizer, True
    quantizer.tensors = frozenset(model.state_dict())
    model.quantization_method = config.quant_method


def detach(model: nn.Module) -> None:
    """Undo `attach`, for a model without quantized layers."""
    forget_timesteps(model)
    forget_weights(model)
    allow_fusing(model)
    for part in model.modules():
        if getattr(vars(part).get("save_pretrained"), "func", None) is refuse_to_save:
            del part.save_pretrained
    gone = ("quantization_config", "_pre_quantization_dtype")
    model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name not in gone})
    del model.quantization_method
