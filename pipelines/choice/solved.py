"""The folder of a study's solved layers: one file a layer with its codes in every option, sealed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dmquant.calib.choice.solving import Solved
from dmquant.convert import LayerPlan
from dmquant.errors import UserError
from dmquant.host.sealed import load_sealed, save_sealed, sealed_about
from dmquant.qtensor import QuantizedTensor
from dmquant.scaling import Scales


class SolvedLayers:
    """Layers of a backbone by name, each solved by its plans by option, in files below `room`."""

    def __init__(self, room: Path, backbone: nn.Module, plans: Mapping[str, Mapping[str, LayerPlan]]):
        self._backbone, self._plans = backbone, plans
        self._files = {name: room / f"{number:05d}.safetensors" for number, name in enumerate(plans)}
        self._moved: dict[str, Tensor] = {}

    def missing(self) -> list[str]:
        """The layers whose files are not there as they were written."""
        about = {name: sealed_about(file) for name, file in self._files.items()}
        return [name for name, of_file in about.items() if not isinstance(of_file, dict) or of_file["layer"] != name]

    def keep(self, name: str, solved: Mapping[str, Solved]) -> None:
        """Write a layer's file."""
        tensors: dict[str, Tensor] = {}
        for place, one in enumerate(solved.values()):
            scales = one.weight.scales
            parts = {"codes": one.weight.codes, "stored": scales.stored, "base": scales.base}
            parts |= {f"{of}.{part}": tensor for of, each in one.parts.items() for part, tensor in each.items()}
            there = {part: tensor for part, tensor in parts.items() if tensor is not None}
            tensors |= {f"{place}.{part}": tensor.contiguous().cpu() for part, tensor in there.items()}
        errors = {option: one.error for option, one in solved.items()}
        save_sealed(self._files[name], tensors, {"layer": name, "errors": errors})

    def errors(self, name: str) -> dict[str, float]:
        """Mean squared errors of a layer's output by option."""
        return self._read(name)[1]["errors"]

    def weight(self, name: str, option: str) -> Tensor:
        """A layer's weight as quantized in an option, (out, in, ...) float32 on the layer's device."""
        layer, step = self._backbone.get_submodule(name), self._plans[name][option]
        tensors, about = self._read(name)
        prefix = f"{list(about['errors']).index(option)}."
        parts = {
            part.removeprefix(prefix): tensor.to(layer.weight.device)
            for part, tensor in tensors.items()
            if part.startswith(prefix)
        }
        scales = Scales(parts.pop("stored"), parts.pop("base", None), step.weights.store)
        codes = QuantizedTensor(parts.pop("codes"), scales, step.weights, tuple(layer.weight.shape))
        of_transforms: dict[str, dict[str, Tensor]] = {}
        for part, tensor in parts.items():
            transform, _, one = part.partition(".")
            of_transforms.setdefault(transform, {})[one] = tensor
        return Solved(codes, of_transforms, 0.0).float_weight(layer, step)

    def weights(self, names: Sequence[str], option: str) -> dict[str, Tensor]:
        """Weights of several layers in one option."""
        return {name: self.weight(name, option) for name in names}

    def change(self, name: str, option: str) -> Tensor:
        """The change of a layer's weight by an option, in the weight's shape and dtype; kept for the next time."""
        if name not in self._moved:
            exact = self._backbone.get_submodule(name).weight.detach()
            self._moved[name] = (self.weight(name, option) - exact.float()).to(exact.dtype)
        return self._moved[name]

    def forget(self) -> None:
        """Drop the changes that were kept."""
        self._moved = {}

    def _read(self, name: str) -> tuple[dict[str, Tensor], Any]:
        found = load_sealed(self._files[name])
        if found is None:
            raise UserError(f"{self._files[name]} is gone or damaged: give the same command again, which makes it anew")
        return found
