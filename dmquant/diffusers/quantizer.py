"""The quantizer that diffusers' `from_pretrained` and `save_pretrained` call.

Loading a full-precision checkpoint with a `QuantConfig` quantizes a layer at a time as its weight is read; loading a
quantized one fills empty quantized layers with its bytes. Registered by `dmquant.diffusers.registering`.
"""

import enum
import inspect
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from dmquant.convert import LayerPlan, layers_in, of_backbone, plan, plan_without_data, quantize_layers_, unmatched
from dmquant.diffusers import families, pairs, tensors  # noqa: F401  (enter what they know)
from dmquant.diffusers.aliases import globs_of, granularity_of, one_of
from dmquant.diffusers.attach import attach, detach
from dmquant.diffusers.dequantize import dequantize_
from dmquant.diffusers.methods import refuse_fusing
from dmquant.diffusers.state import apart, check_unchanged
from dmquant.errors import UsageError, UserError, unknown
from dmquant.host import checksums
from dmquant.layers import QUANTIZED, become_, quantize_layer
from dmquant.models import completed, known, records_quantization
from dmquant.recipe import Recipe, bits_names, recipe_names
from dmquant.transforms import folds_first

VERSION = 2
"""Version of config.json. 1: the codes of a convolution were in the order (in, height, width), not channels last."""
PACKED = ("qweight", "scale", "scale_base")
"""Parameters of a quantized layer that hold its weight, beside the tensors of its transforms."""


LOADED_BY = "import dmquant  (pip install dmquant), before from_pretrained"
"""What a config.json says of how it is loaded, for those who read it because it was not."""


class QuantMethod(str, enum.Enum):
    """diffusers reads `.value` of the method's name."""

    DMQUANT = "dmquant"


class QuantConfig(QuantizationConfigMixin):
    """A `quantization_config` for diffusers: a recipe by name, by bits (`w4a6`), from a YAML file, or as a dict.

    `w` and `a` set its formats and `keep` names more layers (a glob or several) to leave in high precision. The names
    that other quantizers of diffusers have for these are taken as well: `weights_dtype` and `activations_dtype`
    (`"float8"`, `torch.int8`), `modules_to_not_convert` (modules, wherever they are, with all in them), `group_size`.
    It is for one model: rules on other parts of a pipeline (`component`) are left out.
    In a saved model's config.json it is the recipe in full, every rule written out, with the `version` of its codes.

    Raises UsageError for a keyword that is not known and for a setting given under two names, and UserError for a
    version that is not known. `from_pretrained` raises UsageError for a recipe that needs calibration data or quantizes
    no layer.
    """

    def __init__(
        self,
        recipe: "str | Path | dict[str, Any] | Recipe" = "rtn",
        w: str | None = None,
        a: str | None = None,
        keep: str | tuple[str, ...] = (),
        version: int = VERSION,
        *,
        weights_dtype: "str | torch.dtype | None" = None,
        activations_dtype: "str | torch.dtype | None" = None,
        modules_to_not_convert: str | Sequence[str] | None = None,
        group_size: int | None = None,
        quant_method: str = QuantMethod.DMQUANT.value,
        **unknown_keywords: Any,
    ):
        _check_version(version)
        for name in unknown_keywords:
            raise unknown("keyword", name, KEYWORDS, f"QuantConfig takes {', '.join(KEYWORDS)}")
        w, a = one_of(w=w, weights_dtype=weights_dtype), one_of(a=a, activations_dtype=activations_dtype)
        self.quant_method, self.version = QuantMethod.DMQUANT, version
        if isinstance(recipe, str | Path):
            recipe = Recipe.load(recipe, w, a)
        elif isinstance(recipe, dict | Recipe):
            recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe, "recipe")
            given = {"weights": w, "activations": a}
            recipe = recipe.with_settings(**{name: value for name, value in given.items() if value is not None})
        else:
            raise UsageError(f"a recipe is a name, a YAML file, a dict or a Recipe, not {type(recipe).__name__}")
        if group_size is not None:
            recipe = recipe.with_settings(granularity=granularity_of(group_size))
        kept = (keep,) if isinstance(keep, str) else tuple(keep)
        self.recipe = of_backbone(recipe).keeping((*kept, *globs_of(modules_to_not_convert or ())))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the content of a config.json, also of versions without `keep` in recipes, which wrote all rules out.

        UserError where it is none, names a recipe by a file instead of holding it, or holds what its version has not.
        """
        recipe = config_dict.get("recipe") if isinstance(config_dict, dict) else None
        if isinstance(recipe, dict):
            config_dict = config_dict | {"recipe": {"keep": "none"} | recipe}
        elif recipe not in (*recipe_names(), *bits_names()):
            raise UserError("the quantization_config of this model holds no recipe: get its config.json again")
        _check_version(config_dict.get("version", VERSION))
        config_dict = {name: value for name, value in config_dict.items() if name != "loaded_by"}
        if strange := sorted(config_dict.keys() - {*KEYWORDS, "quant_method"}):
            raise UserError(
                f"the quantization_config of this model holds '{strange[0]}', which version {VERSION} does not have: "
                "get its config.json again"
            )
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except UsageError as error:  # whoever loads a model has not typed its recipe
            raise UserError(str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QuantMethod.DMQUANT.value,
            "loaded_by": LOADED_BY,
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that diffusers logs."""
        return self.to_dict()


KEYWORDS = tuple(
    name for name in inspect.signature(QuantConfig).parameters if name not in ("quant_method", "unknown_keywords")
)
"""Names that a QuantConfig takes; `quant_method` is read from config.json."""


class DMQuantizer(DiffusersQuantizer):
    """Plans the layers once the skeleton is known, then swaps them: all at once before loading packed weights, or
    each one when its float weight arrives, or all once the last has arrived where weights change together."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any):
        # `from_single_file` does not say, and reads weights in full precision.
        super().__init__(quantization_config, **{"pre_quantized": False, **kwargs})
        self._plans, self._layers, self._whole_model, self._files = {}, {}, False, []
        self.tensors: frozenset[str] = frozenset()
        """Names of the tensors of the quantized model."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing: every environment that runs torch will do."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch_dtype or torch.float32

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the files, which are hereby known, and compare their sizes and headers with what was saved."""
        self._files = [Path(file) for file in checkpoint_files if str(file).endswith(checksums.WEIGHTS)]
        for file in self._files:
            if fault := checksums.outline_fault(file):
                raise UserError(f"{file} {fault}: get the model again, or remove {checksums.NAME} if that was you")
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        recipe = self.quantization_config.recipe
        if not self.pre_quantized and (warning := unmatched(model, recipe)):
            logging.getLogger("dmquant").warning(warning)
        recipe = completed(recipe, model)
        # A copy, because the caller may load a model of another family with the same configuration.
        self.quantization_config = QuantConfig(recipe, version=self.quantization_config.version)
        places = dict(model.named_modules(remove_duplicate=False))
        plans = (
            empty_layers_(model, self.quantization_config) if self.pre_quantized else plan_without_data(model, recipe)
        )
        layers = {places[step.name]: step for step in plans}
        self._layers = {name: layer for name, layer in places.items() if layer in layers}
        self._plans = {name: layers[layer] for name, layer in self._layers.items()}
        shares = bool(recipe.engine and known(model).joint)
        self._whole_model = shares or any(folds_first(one) for step in plans for one in step.transforms)
        self._check_tensors(model, state_dict)

    def _check_tensors(self, model: nn.Module, state_dict: dict[str, torch.Tensor] | None) -> None:
        """UserError unless the files, or the state dict of a single-file checkpoint, hold the model that is built."""
        if state_dict is not None:
            fault, where = tensors.misfit(model, tensors.of_repeated_layers(model, state_dict)), type(model).__name__
            where = f"the checkpoint of this {where}"
        elif self._files:
            where = str(self._files[0].parent)
            found = tensors.of_files(self._files, where)
            if len(self._files) == 1:  # as diffusers itself does
                model._fix_state_dict_keys_on_load(found)
            fault = tensors.misfit(model, found)
        else:
            return
        if fault is not None:
            raise UserError(f"{where} {fault}: get the model again")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._whole_model and not self.pre_quantized:
            quantize_layers_(model, self.quantization_config.recipe)
        if left := [name for name in self._plans if type(model.get_submodule(name)) in QUANTIZED]:
            raise UserError(
                f"{left[0]} went to disk in full precision: quantize with a device_map without disk, save the model, "
                "and load what was saved with that device_map"
            )
        attach(model, self)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_(model)
        detach(model)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        layer_name, _, leaf = param_name.rpartition(".")
        if layer_name not in self._plans:
            return False
        if self.pre_quantized:
            return leaf in (*PACKED, "input_scale", *self._layers[layer_name].part_names)
        return leaf == "weight" and not self._whole_model

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        if tuple(current_param.shape) != tuple(loaded_param.shape):
            raise UserError(
                f"{param_name} has shape {tuple(loaded_param.shape)} in the file but the recipe in config.json "
                f"implies {tuple(current_param.shape)}: the folder does not hold one model"
            )
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        layer_name, _, leaf = param_name.rpartition(".")
        layer = self._layers[layer_name]
        # Not `param_value`: diffusers has already cast that to the dtype asked for.
        stored = state_dict[param_name].to(target_device)
        if self.pre_quantized:
            setattr(layer, leaf, nn.Parameter(stored, requires_grad=False))
        elif type(layer) in QUANTIZED:  # the first time, where the layer has several names
            step = self._plans[layer_name]
            quantized = quantize_layer(layer, step.weights, step.activations, stored, transforms=step.transforms)
            become_(layer, quantized)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        check_unchanged(state_dict.keys(), self.tensors)
        return apart(state_dict), {}

    @property
    def supports_parallel_loading(self) -> bool:
        """Not while quantizing: weight and bias of a layer may lie in files that would be read at the same time."""
        return self.pre_quantized

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def empty_layers_(model: nn.Module, config: QuantConfig) -> list[LayerPlan]:
    """Replace the layers that a quantized checkpoint holds packed by empty ones on the meta device; their plans.

    Raises UserError for codes of a version that ordered them otherwise.
    """
    plans, layers = plan(model, completed(config.recipe, model)), layers_in(model)
    for step in plans:
        layer = layers[step.name]
        _check_order_of_codes(step.name, layer, config.version)
        empty = QUANTIZED[type(layer)].like(layer, step.weights, step.activations, "meta", step.transforms)
        become_(layer, empty)
    return plans


def _check_version(version: Any) -> None:
    """Raise UserError for a version of config.json that is not of this dmquant or an earlier one."""
    if type(version) is int and version > VERSION:
        raise UserError(
            f"this model was quantized by a later dmquant: its codes are of version {version}, and this one reads "
            f"versions up to {VERSION}: install the dmquant that it was made with, or a later one"
        )
    if type(version) is not int or version < 1:
        raise UserError(f"the version of a quantization_config is 1 to {VERSION}: get this model's config.json again")


def _check_order_of_codes(name: str, layer: nn.Module, version: int) -> None:
    """Raise UserError for codes that would be read in another order than they were written in."""
    if version < VERSION and layer.weight[0, 0].numel() > 1:
        raise UserError(
            f"{name} was quantized by an older dmquant, which ordered a convolution's codes otherwise: "
            "quantize the full-precision model again"
        )


# diffusers offers no registration; should it bring a quantizer of this name itself, that one stays.
auto.AUTO_QUANTIZER_MAPPING.setdefault(QuantMethod.DMQUANT.value, DMQuantizer)
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QuantMethod.DMQUANT.value, QuantConfig)


def mark_quantized(model: nn.Module, recipe: Recipe) -> None:
    """`attach` for a model whose layers were quantized in place by `recipe`."""
    attach(model, DMQuantizer(QuantConfig(completed(recipe, model)), pre_quantized=True))


@records_quantization
def _record(model: nn.Module, recipe: Recipe, layers: Collection[str]) -> bool:
    """Mark a diffusers model, unless some of its layers were quantized by another recipe."""
    from diffusers import ModelMixin

    refuse_fusing(model)
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, tuple(QUANTIZED.values()))}
    if not isinstance(model, ModelMixin) or quantized != set(layers):
        return False
    mark_quantized(model, recipe)
    return True
