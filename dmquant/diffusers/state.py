"""The `state_dict()` of a quantized model, in which diffusers looks up the layers of a LoRA."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.layers import QUANTIZED


class State(OrderedDict):
    """A state in which quantized layers also answer to `<layer>.weight`, although that tensor is not in it.

    diffusers asks for the shapes of Flux' weights so before it loads a LoRA. Nothing that goes through the state meets
    such a weight, and copies and pickles are plain dictionaries.
    """

    layers: Mapping[str, nn.Module] = {}

    def __missing__(self, key: str) -> Tensor:
        if key not in self.layers:
            raise KeyError(key)
        return self.layers[key].weight

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.layers

    def __reduce__(self) -> Any:
        plain = OrderedDict(self)
        vars(plain).update({name: value for name, value in vars(self).items() if name != "layers"})
        return plain.__reduce__()


def answer_to_weights(model: nn.Module) -> None:
    """Let `model.state_dict()` return a `State`."""
    forget_weights(model)
    model._register_state_dict_hook(_as_state)  # the public hook cannot return another dictionary


def forget_weights(model: nn.Module) -> None:
    """Undo `answer_to_weights`."""
    for key in [key for key, hook in model._state_dict_hooks.items() if hook is _as_state]:
        del model._state_dict_hooks[key]


def _as_state(model: nn.Module, state: OrderedDict[str, Tensor], prefix: str, metadata: Any) -> State | None:
    if prefix:  # a part of another module, whose dictionary it fills
        return None
    found = State(state)
    vars(found).update(vars(state))
    quantized = tuple(QUANTIZED.values())
    found.layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, quantized)}
    return found


def check_unchanged(state: Collection[str], quantized: Collection[str]) -> None:
    """UserError where the tensors of a model to be saved, by name, are not those that it had when it was quantized."""
    if changed := sorted(set(state) ^ set(quantized)):
        what = "is new" if changed[0] in set(state) else "is gone"
        raise UserError(
            f"the folder would not load: {changed[0]} {what} since the model was quantized; take adapters off first "
            "(unload_lora_weights, unload_ip_adapter), which are saved on their own"
        )


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with a copy for each further name of a tensor: safetensors writes none of a layer in two places."""
    found, met = {}, set()
    for name, tensor in state.items():
        found[name] = tensor.clone() if tensor.data_ptr() in met else tensor
        met |= {tensor.data_ptr()} - {0}  # of a tensor without data
    return found
