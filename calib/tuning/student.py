"""A quantized backbone that learns: which of its tensors do, and all of them together."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dmquant.calib.blocks.replay import replaced_forward
from dmquant.calib.tuning.held import Held, Mirrored, predicted_bytes, storable
from dmquant.calib.tuning.layer import BRANCH, LORA_RANK, TunedLayer
from dmquant.calib.tuning.optimizers import Lean
from dmquant.errors import UsageError
from dmquant.layers import QUANTIZED
from dmquant.packing import unpack
from dmquant.rounding.straight import can_move

KINDS = {
    "weights": "all codes, by latent weights behind them",
    "scales": "the scales of weights, as their store can hold them",
    "biases": "the biases of all layers",
    "norms": "scales and shifts of normalizations",
    "kept": "the weights of layers in high precision",
    "lora": f"codes, by a change of rank {LORA_RANK} of each weight, which ends in them",
    "branch": "the low-rank branch in 16 bits that a recipe with the transform lowrank stores",
}
"""What may learn, by name, in words."""
RATES = {
    "weights": 6e-3,
    "scales": 3e-3,
    "biases": 1.5e-3,
    "norms": 1.5e-3,
    "kept": 1.5e-3,
    "lora": 4e-3,
    "branch": 1.5e-3,
}
"""Rates of Adam's steps: of `weights` in units of the mean step between two codes, of `biases`, `norms`, `kept` and
`branch` in units of their own root mean square, others as they are."""
_LEAST = 1e-3
_MODULATION = "scale_shift_table"


class Student:
    """A quantized backbone, on its device and in eval mode, of which some tensors learn."""

    def __init__(self, backbone: nn.Module, train: Sequence[str], lean: Lean | None = None, seed: int = 0):
        """UsageError for a kind of which the backbone has nothing."""
        self.backbone, self.train = backbone.requires_grad_(False).eval(), frozenset(train)
        self.held: dict[str, Held] = {}
        self.rates: dict[str, float] = {}
        """Rates of the steps of each tensor that learns, before the schedule lowers them."""
        self.layers: dict[str, TunedLayer] = {}
        self._seed, found = seed, set()
        quantized = [
            (name, one) for name, one in backbone.named_modules() if isinstance(one, tuple(QUANTIZED.values()))
        ]
        for name, layer in quantized:
            started: dict[int, tuple[str, float]] = {}

            def hold(kind: str, values: Tensor, own: Lean | None, started=started) -> Held:
                held = Held(values, own, self._next_seed())
                started[id(held)] = kind, RATES[kind] * _unit_of(kind, values)
                return held

            tuned = TunedLayer(layer, self.train, lean, hold)
            for part, held in tuned.held.items():
                kind, self.rates[f"{name}:{part}"] = started[id(held)]
                self.held[f"{name}:{part}"] = held
                found.add(kind)
            self.layers[name] = tuned
        for name, (kind, parameter) in self._others().items():
            self.held[name] = Mirrored(parameter, storable(parameter))
            self.rates[name] = RATES[kind] * _unit_of(kind, parameter)
            found.add(kind)
        if missing := sorted(self.train - found):
            raise UsageError(
                f"--train {missing[0]}: this model has nothing of that ({KINDS[missing[0]]}): leave it out"
            )

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed

    def _others(self) -> dict[str, tuple[str, nn.Parameter]]:
        """Parameters that learn where they are, by name, with their kind."""
        return {name: (kind, one) for name, kind, one in others(self.backbone) if kind in self.train}

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Let the layers compute with what they learn until the block ends."""
        with contextlib.ExitStack() as stack:
            for tuned in self.layers.values():
                stack.enter_context(replaced_forward(tuned.layer, tuned.forward))
            yield

    def set_rates(self, factor: float) -> None:
        """The rates of the next step, as a factor of those at the beginning; with 0 no step changes anything."""
        for name, held in self.held.items():
            held.rate = self.rates[name] * factor

    def step(self) -> None:
        """Take the steps that wait for gradients to be whole: after every backward pass."""
        for held in self.held.values():
            held.step()

    @property
    def broken(self) -> list[str]:
        """Names of the tensors that were given a gradient of NaN or infinity."""
        return [name for name, held in self.held.items() if held.broken]

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """The values of all that learns."""
        return {name: held.snapshot() for name, held in self.held.items()}

    def restore(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the values of a snapshot."""
        for name, held in self.held.items():
            held.restore(snapshot[name])

    def forget(self) -> None:
        """Begin anew with all optimizers' states."""
        for held in self.held.values():
            held.forget()

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizers' states as they are now."""
        return sum(held.optimizer_bytes for held in self.held.values())

    def commit_(self) -> float:
        """Give the layers what was learned, and leave no gradient behind; the share of codes that changed."""
        changed = total = 0
        for tuned in self.layers.values():
            before = _codes(tuned)
            tuned.commit_()
            changed += int((_codes(tuned) != before).sum())
            total += before.numel()
        self.backbone.requires_grad_(False)
        return changed / total


def others(backbone: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Name, kind and parameter of what can learn outside of quantized layers; none twice."""
    found, seen = [], set()
    for place, module in backbone.named_modules():
        if isinstance(module, tuple(QUANTIZED.values())):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = "norm" in type(module).__name__.lower() or name == _MODULATION
            kind = "norms" if is_norm else {"bias": "biases", "weight": "kept"}.get(name)
            if kind and parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{place}.{name}" if place else name, kind, parameter))
    return found


def bytes_to_hold(backbone: nn.Module, train: Sequence[str], lean: Lean | None) -> int:
    """Bytes that tuning these kinds will hold beside a quantized backbone: values, optimizers, the largest gradient."""
    total, largest = 0, 0
    for layer in backbone.modules():
        if not isinstance(layer, tuple(QUANTIZED.values())):
            continue
        rows, columns = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
        rank, largest = min(LORA_RANK, rows, columns), max(largest, rows * columns)
        if "weights" in train:
            total += predicted_bytes((rows, columns), lean)
        if "lora" in train:
            total += predicted_bytes((rows, rank), None) + predicted_bytes((rank, columns), None)
        if "scales" in train and can_move(layer.weight_spec):
            total += predicted_bytes(layer.weight_spec.scale_shape(layer.weight_shape), None)
        if "biases" in train and layer.bias is not None:
            total += predicted_bytes((rows,), None)
        if "branch" in train:
            branches = [one for one in layer.transforms if one.name == BRANCH]
            total += sum(predicted_bytes(part.shape, None) for one in branches for part in one.parts().values())
    total += sum(predicted_bytes(tuple(one.shape), None) for _, kind, one in others(backbone) if kind in train)
    return total + 3 * 4 * largest


def _codes(tuned: TunedLayer) -> Tensor:
    spec, shape = tuned.spec, tuned.layer.weight_shape
    return unpack(tuned.layer.qweight, spec.fmt.bits, sum(spec.segments(shape)))


def _unit_of(kind: str, values: Tensor) -> float:
    if kind not in ("biases", "norms", "kept", "branch"):
        return 1.0
    return max(_LEAST, float(values.detach().float().square().mean().sqrt()))


def facts_of(held: Mapping[str, Held]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts that bring tensors of the same shapes to the same point of learning."""
    tensors, facts = {}, {}
    for name, one in held.items():
        own, facts[name] = one.state()
        tensors |= {f"{name}|{part}": tensor for part, tensor in own.items()}
    return tensors, facts


def load_facts(held: Mapping[str, Held], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The inverse of `facts_of`."""
    for name, one in held.items():
        prefix = f"{name}|"
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        one.load(own, facts[name])
