"""The quantizer that transformers' `from_pretrained` and `save_pretrained` call, for the text encoders of pipelines.

Loading in full precision with a `QuantConfig` quantizes a layer at a time as its weight is read; loading what is
quantized fills empty quantized layers with its bytes. Registered by `dmquant.diffusers.registering`.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from dmquant.convert import LayerPlan, plan_without_data, quantize_layers_
from dmquant.diffusers.dequantize import dequantize_
from dmquant.diffusers.methods import extend
from dmquant.diffusers.quantizer import QuantConfig, QuantMethod, empty_layers_
from dmquant.diffusers.state import check_unchanged
from dmquant.layers import QUANTIZED, become_, quantize_layer
from dmquant.models import completed, records_quantization
from dmquant.recipe import Recipe
from dmquant.transformers.encoders import check_known
from dmquant.transforms import folds_first


class QuantizeLayer(ConversionOps):
    """Makes a layer a quantized one when its weight arrives."""

    def __init__(self, plans: dict[str, LayerPlan]):
        self._plans = plans

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Quantize the weights in `input_dict`, by full name, of which lists have one; gives back what is none."""
        left = {}
        for name, tensors in input_dict.items():
            weight = tensors[0] if isinstance(tensors, list) else tensors
            layer_name = name.rpartition(".")[0]
            if layer_name not in self._plans:
                left[name] = weight
                continue
            step, layer = self._plans[layer_name], model.get_submodule(layer_name)
            become_(layer, quantize_layer(layer, step.weights, step.activations, weight, transforms=step.transforms))
            (missing_keys if missing_keys is not None else set()).discard(name)
        return left


class EncoderQuantizer(HfQuantizer):
    """Plans the layers once the skeleton is known, then swaps them as DMQuantizer does."""

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._plans: dict[str, LayerPlan] = {}
        self._whole_model = False
        self.tensors: frozenset[str] = frozenset()
        """Names of the tensors of the quantized model."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            check_known(model, config.recipe)
        recipe = completed(config.recipe, model)
        # A copy, because the caller may load a model of another kind with the same configuration.
        self.quantization_config = QuantConfig(recipe, version=config.version)
        if self.pre_quantized:
            empty_layers_(model, self.quantization_config)
            return
        plans = plan_without_data(model, recipe)
        self._whole_model = any(folds_first(one) for step in plans for one in step.transforms)
        self._plans = {} if self._whole_model else {step.name: step for step in plans}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and layer in self._plans

    def get_quantize_ops(self) -> QuantizeLayer:
        return QuantizeLayer(self._plans)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._whole_model and not self.pre_quantized:
            quantize_layers_(model, self.quantization_config.recipe)
        _attach(model, self)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        if not getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved alone
            check_unchanged(model.state_dict().keys(), self.tensors)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _attach(model: nn.Module, quantizer: EncoderQuantizer) -> None:
    """Tell a model of transformers that it is quantized: it is saved as such, cast and counted."""
    from transformers import PreTrainedModel  # which imports the quantizers

    extend(PreTrainedModel, EncoderQuantizer)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.tensors = frozenset(model.state_dict())


def mark_quantized(model: nn.Module, recipe: Recipe) -> None:
    """Have a model of transformers, whose layers were quantized in place by `recipe`, save as such."""
    _attach(model, EncoderQuantizer(QuantConfig(completed(recipe, model)), pre_quantized=True))


@records_quantization
def _record(model: nn.Module, recipe: Recipe, layers: Collection[str]) -> bool:
    """Mark a model of transformers, unless some of its layers were quantized by another recipe."""
    from transformers import PreTrainedModel

    quantized = {name for name, layer in model.named_modules() if isinstance(layer, tuple(QUANTIZED.values()))}
    if not isinstance(model, PreTrainedModel) or quantized != set(layers):
        return False
    mark_quantized(model, recipe)
    return True


# The decorators of transformers ask for a configuration of its own; diffusers asks for one that both take.
auto.AUTO_QUANTIZER_MAPPING.setdefault(QuantMethod.DMQUANT.value, EncoderQuantizer)
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QuantMethod.DMQUANT.value, QuantConfig)
